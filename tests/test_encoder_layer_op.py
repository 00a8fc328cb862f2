"""The encoder layer's one op by itself: against its parts, as torch sees it, who may call it, and
what it refuses. As what layers run it: test_encoder_layer.py."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from tools import assert_within, on_fake_cuda, one_thread
from torch import Tensor
from torch._subclasses import FakeTensorMode

from fastattn.ops import encoder_layer as op_module
from fastattn.ops.encoder_layer import Weights


def weights_of_a_layer(D: int, F: int, dtype: torch.dtype, packed: bool) -> Weights:
    def randn(*shape: int, size: float = 1.0) -> Tensor:
        return (torch.randn(shape) * size).to(dtype)

    def linear(rows: int, columns: int) -> tuple[Tensor, Tensor]:
        return randn(rows, columns, size=columns**-0.5), randn(rows)

    qkv: tuple[Any, ...] = (*linear(D, D), *linear(D, D), *linear(D, D))
    if packed:
        qkv = (*linear(3 * D, D), None, None, None, None)
    norms = [(1.0 + randn(D, size=0.3), randn(D)) for _ in range(2)]
    return Weights(*qkv, *linear(D, D), *norms[0], *linear(F, D), *linear(D, F), *norms[1])


def by_parts(
    x: Tensor, mask: Tensor | None, w: Weights, *, heads: int, scale: float, activation: str,
    eps: tuple[float, float], causal: bool, pre_norm: bool,
) -> Tensor:  # fmt: skip
    """What the op computes, in x's dtype, by torch's parts."""

    def norm(h: Tensor, i: int) -> Tensor:
        weight, bias = ((w.norm1_weight, w.norm1_bias), (w.norm2_weight, w.norm2_bias))[i]
        return F.layer_norm(h, h.shape[-1:], weight, bias, eps[i])

    inner = norm(x, 0) if pre_norm else x
    if w.wk is None:
        qkv = F.linear(inner, w.wq, w.bq).chunk(3, -1)
    else:
        given = ((w.wq, w.bq), (w.wk, w.bk), (w.wv, w.bv))
        qkv = tuple(F.linear(inner, weight, bias) for weight, bias in given)
    q, k, v = (t.unflatten(-1, (heads, -1)).transpose(1, 2) for t in qkv)
    logits = scale * (q @ k.mT)
    S = x.shape[1]
    seen = torch.ones(S, S, dtype=torch.bool).tril() if causal else mask
    if seen is not None:
        logits = logits.masked_fill(~seen, -torch.inf)
    o = F.linear((logits.softmax(-1) @ v).transpose(1, 2).flatten(2), w.wo, w.bo)
    h = x + o if pre_norm else norm(x + o, 0)
    act = {"relu": F.relu, "silu": F.silu, "gelu": F.gelu}[activation]
    inner = norm(h, 1) if pre_norm else h
    y = h + F.linear(act(F.linear(inner, w.w1, w.b1)), w.w2, w.b2)
    return y if pre_norm else norm(y, 1)


# B, S, and what is unusual: 16 tokens or fewer are "few" on every instruction set, 300 on none.
OPTIONS: dict[str, dict[str, Any]] = {
    "few": {"size": (2, 7), "mask": True, "turned": True},
    "few_packed": {"size": (3, 5), "packed": True, "causal": True},
    "few_pre_norm": {"size": (1, 13), "pre_norm": True, "activation": "silu"},
    "few_by_columns": {"size": (2, 6), "by_columns": True, "mask": True},
    "many": {"size": (3, 100), "mask": True, "activation": "silu"},
    "many_packed": {
        "size": (2, 150),
        "packed": True,
        "causal": True,
        "activation": "gelu",
        "turned": True,
    },
    "many_pre_norm": {"size": (2, 150), "pre_norm": True, "mask": True},
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", OPTIONS)
def test_the_op_is_its_parts(name: str, dtype: torch.dtype) -> None:
    """With every number of its own: two eps, a scale that is no root, biases everywhere."""
    chosen = OPTIONS[name]
    (B, tokens_of), D = chosen["size"], 24
    weights = weights_of_a_layer(D, 40, dtype, chosen.get("packed", False))
    if "by_columns" in chosen:
        weights = Weights(
            *(w.t().contiguous().t() if w is not None and w.dim() == 2 else w for w in weights)
        )
    x = torch.randn(B, tokens_of, D).to(dtype)
    if "turned" in chosen:
        x = x.transpose(0, 1).contiguous().transpose(0, 1)
    mask = torch.rand(B, 1, tokens_of, tokens_of) > 0.3 if chosen.get("mask") else None
    if mask is not None:
        mask[..., 0] = True
    kwargs: dict[str, Any] = {
        "heads": 3, "scale": 0.7, "activation": chosen.get("activation", "relu"),
        "eps": (0.5, 2.0), "causal": chosen.get("causal", False),
        "pre_norm": chosen.get("pre_norm", False),
    }  # fmt: skip
    with torch.no_grad(), one_thread():
        got = op_module.encoder_layer(x, mask, weights, **kwargs)
        wide = Weights(*(w if w is None else w.double() for w in weights))
        right = by_parts(x.double(), mask, wide, **kwargs)
        assert_within("y", got, right, [by_parts(x, mask, weights, **kwargs)])


class Subclass(Tensor):
    pass


def served(x: Tensor, backend: str = "auto") -> bool:
    with torch.no_grad():
        return op_module.serves(x, backend)


def test_serves_what_its_kernels_can_and_nobody_wants_in_parts() -> None:
    x = torch.randn(2, 5, 8)
    assert served(x)
    assert served(x, "cpu")
    assert served(x.bfloat16())
    assert not op_module.serves(x, "auto")  # a gradient is wanted
    assert not served(x, "reference")
    assert not served(x, "torch")
    assert not served(x[0])
    assert not served(x.double())
    assert not served(x.to("meta"))
    assert not served(x.as_subclass(Subclass))
    assert not served(torch.nested.nested_tensor([x[0], x[1]], layout=torch.jagged))
    with torch.autocast("cpu", torch.bfloat16):
        assert not served(x)
    with FakeTensorMode(allow_non_fake_inputs=True):
        assert not served(x)
    seen: list[bool] = []

    def look(t: Tensor) -> Tensor:
        seen.append(served(t))
        return t + 1

    torch.func.vmap(look)(torch.randn(3, 2, 5, 8))
    torch.jit.trace(look, (x,), check_trace=False)
    assert seen
    assert not any(seen)


def op_args() -> tuple[Any, ...]:
    x, w = torch.randn(2, 5, 8), torch.randn(8, 8)
    b, g = torch.randn(8), torch.ones(8)
    f, f2, bf = torch.randn(12, 8), torch.randn(8, 12), torch.randn(12)
    mask = torch.ones(2, 1, 1, 5, dtype=torch.bool)
    return (x, mask, w, b, w.clone(), b.clone(), w + 1, b + 1, w + 2, b + 2, g, b + 3, f, bf, f2,
            b + 4, g + 1, b + 5, 2, 0.5, False, 1e-5, 1e-5, 0, False)  # fmt: skip


def test_op_as_torch_sees_it() -> None:
    op = torch.ops.fastattn.encoder_layer.default
    checks = ("test_schema", "test_faketensor")
    result = torch.library.opcheck(op, op_args(), test_utils=checks)
    assert set(result.values()) == {"SUCCESS"}
    real = op(*op_args())
    with FakeTensorMode():
        faked = op(*(on_fake_cuda(a) for a in op_args()))
    assert (faked.shape, faked.dtype, faked.stride()) == (real.shape, real.dtype, real.stride())


@pytest.mark.parametrize(
    ("at", "value", "words"),
    [
        (0, torch.randn(5, 8), r"x must have shape \(B, S, E\), got \(5, 8\)"),
        (2, torch.randn(8, 8).bfloat16(), "weights must have x's dtype"),
        (4, None, "wk and wv must come together"),
        (4, torch.randn(0, 8), r"weights must have shape \(out, in\) and elements, got \(0, 8\)"),
        (8, torch.randn(7, 8), "wo must have 8 rows"),
        (18, 3, "a multiple of 3 heads"),
        (1, torch.ones(2, 1, 1, 4, dtype=torch.bool), "mask dimension 3 must be 1 or 5"),
        (1, torch.ones(2, 1, 1, 5), "mask must be bool"),
    ],
)
def test_direct_calls_stay_inside_their_tensors(at: int, value: Any, words: str) -> None:
    args = list(op_args())
    args[at] = value
    with pytest.raises(RuntimeError, match=words):
        torch.ops.fastattn.encoder_layer.default(*args)
