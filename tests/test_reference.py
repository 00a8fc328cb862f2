"""The oracle itself, against independent things: SDPA, flex_attention, scalar loops, finite
differences, and the published vectors of Philox."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from tools import cumulative
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.flex_attention import AuxRequest, flex_attention

from fastattn import reference

F64 = torch.float64


def randn(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=F64, requires_grad=True)


def assert_same(got: Tensor, want: Tensor, atol: float = 1e-12) -> None:
    torch.testing.assert_close(got, want, rtol=1e-10, atol=atol)


# ------------------------------------------------------------------------------------ scalar loop


def by_loops(q: Tensor, k: Tensor, v: Tensor, **given: Any) -> tuple[Tensor, Tensor, Tensor]:
    """api.md's definition, one scalar at a time."""
    (batch, heads, sq, d), (_, hk, sk, dv) = q.shape, v.shape
    o = torch.zeros(batch, heads, sq, dv, dtype=F64)
    lse = torch.full((batch, heads, sq), -math.inf, dtype=F64)
    weights = torch.zeros(batch, heads, sq, sk, dtype=F64)

    def at(x: Tensor, *index: int) -> float:
        return x.broadcast_to(batch, heads, sq, sk)[index].item()

    for b in range(batch):
        nq = sq if given.get("q_lens") is None else int(given["q_lens"][b])
        nk = sk if given.get("k_lens") is None else int(given["k_lens"][b])
        for h in range(heads):
            for i in range(nq):
                logits = {}
                for j in range(nk):
                    kv_head = h // (heads // hk)
                    s = sum(q[b, h, i, c].item() * k[b, kv_head, j, c].item() for c in range(d))
                    s *= given.get("scale") or d**-0.5
                    if given.get("softcap"):
                        s = given["softcap"] * math.tanh(s / given["softcap"])
                    if given.get("alibi_slopes") is not None:
                        slopes = given["alibi_slopes"]
                        slope = slopes[h] if slopes.dim() == 1 else slopes[b, h]
                        s -= slope.item() * abs(i + nk - nq - j)
                    if given.get("bias") is not None:
                        s += at(given["bias"], b, h, i, j)
                    bottom_right = given.get("causal") == "bottom_right"
                    diagonal = i + nk - nq if bottom_right else i
                    left, right = given.get("window") or (None, None)
                    hidden = (
                        (given.get("mask") is not None and not at(given["mask"], b, h, i, j))
                        or (given.get("causal") and j > diagonal)
                        or (left is not None and j < diagonal - left)
                        or (right is not None and j > diagonal + right)
                    )
                    if not hidden and s > -math.inf:
                        logits[j] = s
                sink = given["sinks"][h].item() if given.get("sinks") is not None else -math.inf
                top = max([*logits.values(), sink])
                if top == -math.inf:
                    continue
                total = sum(math.exp(s - top) for s in [*logits.values(), sink])
                lse[b, h, i] = top + math.log(total)
                for j, s in logits.items():
                    w = math.exp(s - top) / total
                    p = given.get("dropout_p", 0.0)
                    if p:
                        word = philox_by_hand(given["seed"], (j >> 2, i, b * heads + h, 0))[j & 3]
                        w = 0.0 if word < round(p * 2**32) else w / (1 - p)
                    weights[b, h, i, j] = w
                    o[b, h, i] += w * v[b, kv_head, j].detach()
    return o, lse, weights


def philox_by_hand(seed: int, counter: tuple[int, int, int, int]) -> tuple[int, ...]:
    """Philox-4x32-10 on Python's integers, as the paper writes it."""
    (c0, c1, c2, c3), word = counter, 2**32
    k0, k1 = seed % word, (seed >> 32) % word
    for _ in range(10):
        p0, p1 = 0xD2511F53 * c0, 0xCD9E8D57 * c2
        c0, c1, c2, c3 = p1 // word ^ c1 ^ k0, p1 % word, p0 // word ^ c3 ^ k1, p0 % word
        k0, k1 = (k0 + 0x9E3779B9) % word, (k1 + 0xBB67AE85) % word
    return c0, c1, c2, c3


def mask_of(*shape: int) -> Tensor:
    return torch.rand(*shape) > 0.4


LOOP_CASES: dict[str, Callable[[], dict[str, Any]]] = {
    "plain": dict,
    "causal": lambda: {"causal": True},
    "bottom_right": lambda: {"causal": "bottom_right"},
    "mask": lambda: {"mask": mask_of(2, 4, 5, 7)},
    "mask_row": lambda: {"mask": mask_of(7)},
    "bias": lambda: {"bias": torch.randn(1, 4, 1, 7, dtype=F64)},
    "window": lambda: {"window": (1, 2)},
    "window_left": lambda: {"window": (2, None)},
    "window_right": lambda: {"window": (None, 0)},
    "window_bottom_right": lambda: {"window": (2, 1), "causal": "bottom_right"},
    "lengths": lambda: {"q_lens": torch.tensor([3, 5]), "k_lens": torch.tensor([7, 4])},
    "no_keys": lambda: {"k_lens": torch.tensor([0, 6])},
    "alibi": lambda: {"alibi_slopes": torch.rand(4, dtype=F64)},
    "alibi_batch": lambda: {"alibi_slopes": torch.rand(2, 4, dtype=F64)},
    "softcap": lambda: {"softcap": 1.5},
    "sinks": lambda: {"sinks": torch.randn(4, dtype=F64)},
    "scale": lambda: {"scale": 0.3},
    "dropout": lambda: {"dropout_p": 0.4, "seed": 2**63 + 12345},
    "all": lambda: {
        "mask": mask_of(2, 1, 5, 7),
        "bias": torch.randn(4, 5, 1, dtype=F64),
        "causal": "bottom_right",
        "window": (3, 4),
        "q_lens": torch.tensor([4, 2], dtype=torch.int32),
        "k_lens": torch.tensor([5, 7], dtype=torch.int32),
        "alibi_slopes": torch.rand(4, dtype=F64),
        "softcap": 2.0,
        "sinks": torch.randn(4, dtype=F64),
        "scale": 0.7,
        "dropout_p": 0.3,
        "seed": -5,
    },
}


@pytest.mark.parametrize("case", LOOP_CASES)
def test_equals_scalar_loops(case: str) -> None:
    q, k, v = randn(2, 4, 5, 3), randn(2, 2, 7, 3), randn(2, 2, 7, 2)
    given = LOOP_CASES[case]()
    o, lse, weights = reference.attention(q, k, v, **given, return_lse=True, return_weights=True)
    want_o, want_lse, want_weights = by_loops(q, k, v, **given)
    assert_same(o, want_o)
    assert_same(lse, want_lse)
    assert_same(weights, want_weights)
    *_, mean = reference.attention(q, k, v, **given, return_weights="mean")
    assert_same(mean, want_weights.mean(1))


# --------------------------------------------------------------------------------- torch's own ops

SDPA_CASES: dict[str, tuple[tuple[int, int], dict[str, Any], dict[str, Any]]] = {
    # (Sq, Sk), our arguments, SDPA's
    "plain": ((9, 13), {}, {}),
    "causal_square": ((11, 11), {"causal": True}, {"is_causal": True}),
    "causal_wide": ((5, 11), {"causal": True}, {"is_causal": True}),
    "causal_tall": ((11, 5), {"causal": True}, {"is_causal": True}),
    "scale": ((9, 13), {"scale": 0.05}, {"scale": 0.05}),
}


@pytest.mark.parametrize("case", SDPA_CASES)
@pytest.mark.parametrize("kv_heads", [6, 2, 1])
def test_equals_sdpa_math(case: str, kv_heads: int) -> None:
    (sq, sk), ours, theirs = SDPA_CASES[case]
    q, k, v = randn(2, 6, sq, 8), randn(2, kv_heads, sk, 8), randn(2, kv_heads, sk, 4)
    o = reference.attention(q, k, v, **ours)
    with sdpa_kernel(SDPBackend.MATH):
        want = F.scaled_dot_product_attention(q, k, v, enable_gqa=True, **theirs)
    assert_same(o, want)
    do = torch.randn_like(o)
    grads, wants = (torch.autograd.grad(x, (q, k, v), do) for x in (o, want))
    for got, w in zip(grads, wants, strict=True):
        assert_same(got, w)


@pytest.mark.parametrize("form", ["bool", "minus_inf", "finfo_min", "bias"])
def test_equals_sdpa_math_with_mask(form: str) -> None:
    q, k, v = randn(2, 3, 9, 8), randn(2, 3, 13, 8), randn(2, 3, 13, 8)
    shown = mask_of(2, 1, 9, 13)
    shown[..., 0] = True
    bias = torch.randn(3, 9, 1, dtype=F64, requires_grad=True)
    low = {"minus_inf": -math.inf, "finfo_min": torch.finfo(F64).min}
    if form == "bool":
        ours, theirs = {"mask": shown}, shown
    elif form == "bias":
        ours, theirs = {"bias": bias, "mask": shown}, bias.masked_fill(~shown, -math.inf)
    else:
        theirs = torch.zeros(shown.shape, dtype=F64).masked_fill(~shown, low[form])
        ours = {"bias": theirs}
    o = reference.attention(q, k, v, **ours)
    with sdpa_kernel(SDPBackend.MATH):
        want = F.scaled_dot_product_attention(q, k, v, attn_mask=theirs)
    assert_same(o, want)
    inputs = (q, k, v, bias) if form == "bias" else (q, k, v)
    do = torch.randn_like(o)
    grads, wants = (torch.autograd.grad(x, inputs, do) for x in (o, want))
    for got, w in zip(grads, wants, strict=True):
        assert_same(got, w)


def test_row_of_finfo_min_is_uniform_as_in_torch() -> None:
    q, k, v = randn(1, 1, 2, 4), randn(1, 1, 5, 4), randn(1, 1, 5, 4)
    bias = torch.full((2, 5), torch.finfo(F64).min, dtype=F64)
    o = reference.attention(q, k, v, bias=bias)
    assert_same(o, v.mean(2, keepdim=True).expand_as(o))
    with sdpa_kernel(SDPBackend.MATH):
        assert_same(o, F.scaled_dot_product_attention(q, k, v, attn_mask=bias))


@pytest.mark.filterwarnings("ignore:flex_attention called without")
def test_equals_flex_attention() -> None:
    """softcap, ALiBi, bias, window and lengths by a score_mod (which has no backward on CPUs)."""
    q, k, v = (torch.randn(2, h, s, 8, dtype=F64) for h, s in ((4, 12), (2, 20), (2, 20)))
    bias, slopes = torch.randn(4, 1, 20, dtype=F64), torch.rand(4, dtype=F64)
    lens = torch.tensor([20, 14])

    def score_mod(score: Tensor, b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        score = 2.0 * torch.tanh(score / 2.0)
        score = score - slopes[h] * (i + lens[b] - 12 - j).abs() + bias[h, 0, j]
        shown = (j < lens[b]) & (j >= i + lens[b] - 12 - 4) & (j <= i + lens[b] - 12)
        return torch.where(shown, score, -math.inf)

    want, aux = flex_attention(
        q, k, v, score_mod=score_mod, enable_gqa=True, return_aux=AuxRequest(lse=True)
    )
    o, lse = reference.attention(
        q,
        k,
        v,
        bias=bias,
        alibi_slopes=slopes,
        softcap=2.0,
        causal="bottom_right",
        window=(4, None),
        k_lens=lens,
        return_lse=True,
    )
    assert_same(o, want)
    assert_same(lse, aux.lse.double(), atol=1e-5)  # flex gives its lse in fp32


# ------------------------------------------------------------------------------------- derivatives


@pytest.mark.parametrize("case", LOOP_CASES)
def test_gradcheck_twice(case: str) -> None:
    given = LOOP_CASES[case]()
    leaves = {"q": randn(2, 4, 5, 3), "k": randn(2, 2, 7, 3), "v": randn(2, 2, 7, 2)}
    leaves |= {n: given[n].requires_grad_() for n in ("bias", "sinks") if n in given}

    def outputs(*xs: Tensor) -> tuple[Tensor, ...]:
        named = dict(zip(leaves, xs, strict=True))
        o, lse, weights = reference.attention(
            **{**given, **named}, return_lse=True, return_weights=True
        )
        return o, lse[lse.isfinite()], weights  # finite differences know no -inf

    inputs = tuple(leaves.values())
    assert torch.autograd.gradcheck(outputs, inputs, fast_mode=True)
    assert torch.autograd.gradgradcheck(outputs, inputs, fast_mode=True)


def test_gradcheck_twice_varlen() -> None:
    cu_q, cu_k = cumulative([3, 0, 4]), cumulative([2, 3, 5])
    q, k, v, sinks = randn(9, 4, 3), randn(10, 2, 3), randn(10, 2, 2), randn(4)
    bias = randn(1, 1, 4, 5)

    def outputs(*xs: Tensor) -> tuple[Tensor, ...]:
        o, weights = reference.attention_varlen(
            *xs[:3], cu_q, cu_k, sinks=xs[3], bias=xs[4], causal="bottom_right", return_weights=True
        )
        return o, weights

    assert torch.autograd.gradcheck(outputs, (q, k, v, sinks, bias), fast_mode=True)
    assert torch.autograd.gradgradcheck(outputs, (q, k, v, sinks, bias), fast_mode=True)


# ------------------------------------------------------------------------------------------ packed


@pytest.mark.parametrize("case", ["plain", "bottom_right", "window_bottom_right", "alibi", "sinks"])
def test_varlen_equals_one_call_a_sequence(case: str) -> None:
    lens_q, lens_k, slack = [3, 0, 5, 1], [4, 2, 5, 0], 2
    cu_q, cu_k = cumulative(lens_q), cumulative(lens_k)
    q, k, v = (randn(sum(n) + slack, h, 3) for n, h in ((lens_q, 4), (lens_k, 2), (lens_k, 2)))
    given = LOOP_CASES[case]()
    bias = torch.randn(4, 1, 5, 5, dtype=F64)
    o, lse, weights = reference.attention_varlen(
        q, k, v, cu_q, cu_k, bias=bias, **given, return_lse=True, return_weights=True
    )
    do = torch.randn_like(o)
    grads = torch.autograd.grad(o, (q, k, v), do)
    wants = [torch.zeros_like(x) for x in (q, k, v)]
    assert torch.equal(o[-slack:], torch.zeros_like(o[-slack:]))
    assert (lse[:, -slack:] == -math.inf).all()
    for b, (nq, nk) in enumerate(zip(lens_q, lens_k, strict=True)):
        rows, keys = slice(cu_q[b], cu_q[b + 1]), slice(cu_k[b], cu_k[b + 1])
        alone = [x.transpose(0, 1)[None] for x in (q[rows], k[keys], v[keys])]
        want_o, want_lse, want_w = reference.attention(
            *alone, bias=bias[b, :, :nq, :nk], **given, return_lse=True, return_weights=True
        )
        assert_same(o[rows].transpose(0, 1)[None], want_o)
        assert_same(lse[:, rows][None], want_lse)
        assert_same(weights[b : b + 1, :, :nq, :nk], want_w)
        assert weights[b, :, nq:].count_nonzero() + weights[b, :, :, nk:].count_nonzero() == 0
        if nq and nk:
            own = torch.autograd.grad(
                want_o, (q, k, v), do[rows].transpose(0, 1)[None], retain_graph=True
            )
            wants = [w + g for w, g in zip(wants, own, strict=True)]
    for got, w in zip(grads, wants, strict=True):
        assert_same(got, w)


def test_varlen_equals_padded_with_dropout() -> None:
    lens = torch.tensor([4, 6])
    q, k, v = randn(2, 2, 6, 4), randn(2, 2, 6, 4), randn(2, 2, 6, 4)
    o = reference.attention(q, k, v, q_lens=lens, k_lens=lens, dropout_p=0.5, seed=3)
    pack = [torch.cat([x[0, :, :4], x[1]], 1).transpose(0, 1) for x in (q, k, v)]
    cu = cumulative([4, 6])
    packed_o = reference.attention_varlen(*pack, cu, cu, dropout_p=0.5, seed=3)
    assert_same(packed_o, torch.cat([o[0, :, :4], o[1]], 1).transpose(0, 1))


# ----------------------------------------------------------------------------------------- dropout

VECTORS = [  # Random123's kat_vectors, philox4x32 10
    ((0, 0, 0, 0), (0, 0), "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
    ((2**32 - 1,) * 4, (2**32 - 1,) * 2, "408f276d 41c83b0e a20bc7c6 6d5451fd"),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        "d16cfe09 94fdcceb 5001e420 24126ea1",
    ),
]


@pytest.mark.parametrize(("counter", "key", "words"), VECTORS)
def test_philox_published_vectors(counter: Any, key: Any, words: str) -> None:
    want = [int(w, 16) for w in words.split()]
    ints = tuple(torch.tensor(c) for c in counter)
    assert [int(w) for w in reference.philox_4x32(ints, key)] == want
    tensor_key = tuple(torch.tensor(w) for w in key)
    assert [int(w) for w in reference.philox_4x32(ints, tensor_key)] == want
    assert list(philox_by_hand(key[0] | key[1] << 32, counter)) == want


@pytest.mark.parametrize("seed", [0, 1, -1, 2**40 + 7, 2**63 - 1, -(2**63), 2**64 - 1])
def test_philox_coordinates_and_seed(seed: int) -> None:
    u32 = reference.philox_uniform_u32(
        seed, torch.arange(6).view(-1, 1, 1), torch.arange(5).view(-1, 1), torch.arange(9)
    )
    want = [
        [[philox_by_hand(seed, (j >> 2, i, bh, 0))[j & 3] for j in range(9)] for i in range(5)]
        for bh in range(6)
    ]
    assert u32.tolist() == want
    if seed < 2**63:
        keep = reference.dropout_keep(torch.tensor([seed]), 0.3, 2, 3, 5, 9)
        assert torch.equal(keep, (torch.tensor(want) >= round(0.3 * 2**32)).view(2, 3, 5, 9))
    sites = [
        reference.philox_uniform_u32(seed, *(torch.tensor([3]),) * 3, site=s) for s in range(2)
    ]
    assert sites[1].item() == philox_by_hand(seed, (0, 3, 3, 1))[3] != sites[0].item()


def test_dropout_threshold_is_exact() -> None:
    u32 = reference.philox_uniform_u32(
        9, torch.zeros(1, dtype=torch.int64), torch.zeros(1, dtype=torch.int64), torch.arange(64)
    )
    value = int(u32[5])
    for p, kept in ((value / 2**32, True), ((value + 1) / 2**32, False)):
        assert bool(reference.dropout_keep(9, p, 1, 1, 1, 64)[0, 0, 0, 5]) is kept


def test_unseeded_dropout_follows_torchs_generator() -> None:
    q = randn(1, 1, 16, 4)
    torch.manual_seed(5)
    first = reference.attention(q, q, q, dropout_p=0.5)
    second = reference.attention(q, q, q, dropout_p=0.5)
    torch.manual_seed(5)
    assert torch.equal(first, reference.attention(q, q, q, dropout_p=0.5))
    assert not torch.equal(first, second)


# ------------------------------------------------------------------------------ dtypes and refusals


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, F64])
def test_dtypes_of_results(dtype: torch.dtype) -> None:
    q = torch.randn(1, 2, 5, 4, dtype=dtype)
    o, lse, w = reference.attention(q, q, q, return_lse=True, return_weights=True)
    assert (o.dtype, w.dtype) == (dtype, dtype)
    assert lse.dtype == (F64 if dtype == F64 else torch.float32)
    o64 = reference.attention(q.double(), q.double(), q.double())
    assert (o.double() - o64).abs().max() < 8 * torch.finfo(dtype).eps * q.abs().max()


def test_refuses_unknown_causal() -> None:
    q = randn(1, 1, 2, 2)
    with pytest.raises(ValueError, match=r"causal.*bottom_left"):
        reference.attention(q, q, q, causal="bottom_left")
