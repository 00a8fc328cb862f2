"""Values and gradients of `attention` on every kernel backend, feature by feature.

The rule is that of tools.judge: at most twice the error of plain PyTorch in the same dtype.
"""

from dataclasses import replace

import pytest
import torch
from tools import DTYPES, FEATURES, KINDS, featured, judge, padded, values

import fastattn

SDPA_SHAPES = {
    # (B, H, Hk, Sq, Sk, D, Dv)
    "square": (2, 3, 3, 128, 128, 64, 64),
    "tails": (1, 4, 2, 131, 197, 48, 48),
    "wide_v": (1, 2, 1, 77, 300, 32, 64),
    "long": (1, 1, 1, 1023, 1025, 64, 64),
    "decode": (2, 4, 1, 1, 1500, 64, 64),
}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("form", ["plain", "causal", "mask"])
@pytest.mark.parametrize("shape", SDPA_SHAPES)
def test_no_worse_than_twice_sdpa(kernel: str, shape: str, form: str, dtype: torch.dtype) -> None:
    b, h, hk, sq, sk, d, dv = SDPA_SHAPES[shape]
    problem = featured(form, b=b, h=h, hk=hk, sq=sq, sk=sk, d=d, dv=dv, dtype=dtype)
    judge(problem, kernel, against="sdpa")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("causal", [False, True])
def test_kinds_of_values(kernel: str, kind: str, causal: bool, dtype: torch.dtype) -> None:
    judge(padded(h=3, sq=150, sk=170, d=64, dtype=dtype, kind=kind, causal=causal), kernel)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("feature", FEATURES)
def test_features(kernel: str, feature: str, dtype: torch.dtype) -> None:
    judge(featured(feature, b=3, h=4, hk=2, sq=67, sk=131, d=40, dtype=dtype), kernel)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("feature", ["causal", "bottom_right", "window_bottom_right", "alibi"])
def test_features_with_more_rows_than_keys(kernel: str, feature: str, dtype: torch.dtype) -> None:
    judge(featured(feature, b=2, h=2, sq=139, sk=70, d=32, dtype=dtype), kernel)


@pytest.mark.parametrize("window", [(0, 0), (1, None), (None, 3), (64, 64), (200, 0), (1000, 1000)])
@pytest.mark.parametrize("causal", [False, True, "bottom_right"])
def test_windows_over_many_blocks(
    kernel: str, window: tuple[int | None, int | None], causal: bool | str
) -> None:
    """Blocks beside the window are skipped: a block too few would change the values."""
    judge(padded(b=1, h=2, sq=401, sk=517, d=16, causal=causal, window=window), kernel)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("d", "dv"),
    [
        *((d, d) for d in (1, 8, 16, 72, 80, 96, 128, 160, 255, 256)),
        *((3, 5), (31, 33), (33, 31), (100, 7), (7, 100), (192, 128), (64, 256)),
    ],
)
def test_head_dims(kernel: str, d: int, dv: int, dtype: torch.dtype) -> None:
    judge(padded(b=1, h=2, sq=45, sk=83, d=d, dv=dv, dtype=dtype, causal=True), kernel)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("sq", [1, 2, 15, 16, 17, 31, 63, 64, 65, 97, 128, 257])
@pytest.mark.parametrize("sk", [1, 2, 16, 33, 64, 65, 127, 256, 263])
def test_lengths_around_the_tiles(kernel: str, sq: int, sk: int, dtype: torch.dtype) -> None:
    judge(padded(b=1, h=2, sq=sq, sk=sk, d=24, dtype=dtype), kernel)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    ("b", "h", "hk"), [(1, 1, 1), (5, 3, 3), (1, 8, 1), (2, 6, 2), (3, 12, 4), (16, 2, 1)]
)
def test_batches_and_grouped_heads(
    kernel: str, b: int, h: int, hk: int, dtype: torch.dtype
) -> None:
    judge(padded(b=b, h=h, hk=hk, sq=33, sk=50, d=32, dtype=dtype, causal="bottom_right"), kernel)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [
    (2, 3, 70, 90), (2, 3, 70, 1), (2, 3, 1, 90), (2, 3, 1, 1), (2, 1, 70, 90), (2, 1, 70, 1),
    (2, 1, 1, 90), (2, 1, 1, 1), (1, 3, 70, 90), (1, 3, 70, 1), (1, 3, 1, 90), (1, 3, 1, 1),
    (1, 1, 70, 90), (1, 1, 70, 1), (1, 1, 1, 90), (1, 1, 1, 1), (3, 70, 90), (70, 90), (90,), (),
])  # fmt: skip
def test_bias_gradient_in_its_own_shape(
    kernel: str, shape: tuple[int, ...], dtype: torch.dtype
) -> None:
    problem = padded(b=2, h=3, sq=70, sk=90, d=16, dtype=dtype, bias=values(shape, dtype, "normal"))
    got = judge(problem, kernel)
    assert got.grads["bias"].shape == shape


@pytest.mark.parametrize("shape", [(2, 3, 70, 90), (2, 1, 1, 90), (3, 70, 1), (70, 90), (90,), ()])
def test_masks_of_every_rank(kernel: str, shape: tuple[int, ...]) -> None:
    mask = torch.rand(shape) < 0.6
    judge(padded(b=2, h=3, sq=70, sk=90, d=16, mask=mask), kernel)


@pytest.mark.parametrize("bias_dtype", [*DTYPES, torch.float64], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_bias_dtype_need_not_be_that_of_q(
    kernel: str, dtype: torch.dtype, bias_dtype: torch.dtype
) -> None:
    bias = values((1, 2, 40, 40), bias_dtype, "normal")
    judge(padded(sq=40, dtype=dtype, bias=bias, sinks=values((2,), bias_dtype, "normal")), kernel)


LAYOUTS = {
    "bshd": lambda b, h, s, d: torch.randn(b, s, h, d).transpose(1, 2),
    "d_outermost": lambda b, h, s, d: torch.randn(d, b, h, s).permute(1, 2, 3, 0),
    "expanded_batch": lambda b, h, s, d: torch.randn(1, h, s, d).expand(b, h, s, d),
    "expanded_heads": lambda b, h, s, d: torch.randn(b, 1, s, d).expand(b, h, s, d),
    "expanded_rows": lambda b, h, s, d: torch.randn(b, h, 1, d).expand(b, h, s, d),
    "every_second": lambda b, h, s, d: torch.randn(b, h, 2 * s, 2 * d)[:, :, ::2, 1::2],
    "of_fused_qkv": lambda b, h, s, d: torch.randn(b, s, 3, h, d)[:, :, 1].transpose(1, 2),
    "odd_offset": lambda b, h, s, d: torch.randn(b * h * s * d + 1)[1:].view(b, h, s, d),
}


def in_layout(x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """x in another dtype with the very same strides (`.to` makes its own)."""
    room = sum((n - 1) * s for n, s in zip(x.shape, x.stride(), strict=True)) + 1
    storage = torch.empty(x.storage_offset() + room, dtype=dtype)
    y = storage.as_strided(x.shape, x.stride(), x.storage_offset())
    once = tuple(slice(0, 1 if s == 0 else None) for s in x.stride())
    y[once].copy_(x[once])
    return y


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("which", ["q", "k", "v", "qkv"])
def test_any_strides(kernel: str, which: str, layout: str, dtype: torch.dtype) -> None:
    problem = padded(b=2, h=3, sq=50, sk=50, d=32, dtype=dtype, causal=True)
    for name in which:
        shape = getattr(problem, name).shape
        problem = replace(problem, **{name: in_layout(LAYOUTS[layout](*shape), dtype)})
    judge(problem, kernel)


@pytest.mark.parametrize("layout", ["transposed", "expanded", "every_second"])
def test_any_strides_of_mask_and_bias(kernel: str, layout: str) -> None:
    make = {
        "transposed": lambda: torch.randn(2, 3, 60, 50).transpose(-1, -2),
        "expanded": lambda: torch.randn(2, 1, 1, 60).expand(2, 3, 50, 60),
        "every_second": lambda: torch.randn(2, 3, 100, 120)[:, :, ::2, ::2],
    }[layout]
    judge(padded(b=2, h=3, sq=50, sk=60, d=16, bias=make(), mask=make() < 0.7), kernel)


def test_result_needs_no_copy_for_the_projection_after_it(kernel: str) -> None:
    """From (B, S, H, D) memory the output comes back in such memory, and so do gradients."""
    q, k, v = (torch.randn(2, 9, 3, 8).transpose(1, 2).requires_grad_() for _ in range(3))
    o = fastattn.attention(q, k, v, backend=kernel)
    assert o.transpose(1, 2).is_contiguous()
    for grad in torch.autograd.grad(o, (q, k, v), torch.randn_like(o)):
        assert grad.transpose(1, 2).is_contiguous()


def test_auto_takes_the_kernel_and_the_reference_for_float64(kernel: str) -> None:
    q, k, v = (torch.randn(1, 2, 40, 16) for _ in range(3))
    auto, named = (fastattn.attention(q, k, v, backend=b) for b in ("auto", kernel))
    assert torch.equal(auto, named)
    doubles = [x.double() for x in (q, k, v)]
    o, lse = fastattn.attention(*doubles, return_lse=True)
    assert o.dtype == lse.dtype == torch.float64
    assert torch.equal(o, fastattn.reference.attention(*doubles))


def test_returns_exactly_what_was_asked_for(backend: str) -> None:
    q = torch.randn(2, 3, 5, 4)
    o = fastattn.attention(q, q, q, backend=backend)
    assert isinstance(o, torch.Tensor)
    shapes = {
        (True, False): [(2, 3, 5, 4), (2, 3, 5)],
        (False, True): [(2, 3, 5, 4), (2, 3, 5, 5)],
        (True, True): [(2, 3, 5, 4), (2, 3, 5), (2, 3, 5, 5)],
        (True, "mean"): [(2, 3, 5, 4), (2, 3, 5), (2, 5, 5)],
    }
    for (lse, weights), want in shapes.items():
        got = fastattn.attention(q, q, q, return_lse=lse, return_weights=weights, backend=backend)
        assert [tuple(x.shape) for x in got] == want
        torch.testing.assert_close(got[0], o)
