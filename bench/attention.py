"""Rows of attention: speed and memory.

Shapes: q (B, H, Sq, D), k and v (B, Hk, Sk, D). The baseline is F.scaled_dot_product_attention with
masks as its user has to give them: a window is a bool (S, S), key padding a bool (B, 1, 1, S),
additive bias a float attn_mask that requires grad, grouped heads enable_gqa=True.

FLOPs: 4·D a (query, key) pair forward (q·k and p·v), 10·D backward (dv, dp, ds·k, dsᵀ·q and the
recomputed q·k), so 14·D for both.
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

import fastattn
from bench import peers
from bench.harness import DTYPES, Case, Contest, Setting, compiled, step

FWD_FLOPS, BWD_FLOPS = 4, 10


@dataclass(frozen=True)
class Shape:
    B: int = 1
    H: int = 12
    S: int = 2048
    D: int = 64
    dtype: str = "fp32"
    train: bool = False
    causal: bool = False
    Sq: int | None = None  # where it differs from S
    Hk: int | None = None

    @property
    def rows(self) -> int:
        return self.S if self.Sq is None else self.Sq

    @property
    def kv_heads(self) -> int:
        return self.H if self.Hk is None else self.Hk

    @property
    def item(self) -> int:
        return DTYPES[self.dtype].itemsize


def tensors(s: Shape) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """q, k, v and an upstream gradient of o."""
    dtype = DTYPES[s.dtype]
    q = torch.randn(s.B, s.H, s.rows, s.D).to(dtype)
    k, v = (torch.randn(s.B, s.kv_heads, s.S, s.D).to(dtype) for _ in range(2))
    do = torch.randn(s.B, s.H, s.rows, s.D).to(dtype)
    for t in (q, k, v):
        t.requires_grad_(s.train)
    return q, k, v, do


def contest_of(
    s: Shape,
    stock: Callable[[Tensor, Tensor, Tensor], Tensor],
    fused: Callable[[Tensor, Tensor, Tensor], Tensor],
    *,
    pairs: float | None = None,
    extra: Tensor | None = None,
    others: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] | None = None,
) -> Contest:
    """Build both thunks on the same tensors. `pairs`: (query, key) pairs that take part, over all
    batch entries and heads; `extra`: one more leaf that wants a gradient (a bias); `others`: peers,
    by name."""
    q, k, v, do = tensors(s)
    leaves = [q, k, v] + ([extra] if extra is not None else [])
    dense = float(s.B * s.H * s.rows * s.S)
    per_pair = (FWD_FLOPS + (BWD_FLOPS if s.train else 0)) * s.D
    useful = dense if pairs is None else pairs
    operands = float(s.item * (2 * q.numel() + k.numel() + v.numel()))

    def one(fn: Callable[[Tensor, Tensor, Tensor], Tensor]) -> Callable[[], object]:
        return step(lambda *_: fn(q, k, v), leaves, [do], s.train)

    return Contest(
        stock=one(stock),
        fused=one(fused),
        peers={name: one(fn) for name, fn in (others or {}).items()},
        flops=useful * per_pair,
        flops_dense=dense * per_pair,
        bytes=operands,
        operands=operands,
        sdpa=True,
    )


def plain(s: Shape, setting: Setting, *, slow: bool = False) -> Contest:
    """slow: the peers that are compiled first as well."""
    gqa = s.kv_heads != s.H
    below = s.S * (s.S + 1) / 2 if s.causal else None

    def sdpa(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(q, k, v, is_causal=s.causal, enable_gqa=gqa)

    others = peers.attention(s.causal) if s.kv_heads == s.H else {}
    if slow and setting.peers:
        others["torch.compile"] = compiled(sdpa)
        if not s.train:  # flex_attention on the CPU has no backward
            keep = None if not s.causal else lambda b, h, i, j: j <= i
            others["flex_attention"] = peers.flex(s.S, keep=keep)
    return contest_of(
        s,
        sdpa,
        lambda q, k, v: fastattn.attention(q, k, v, causal=s.causal, backend=setting.backend),
        pairs=None if below is None else s.B * s.H * below,
        others=others,
    )


def window(s: Shape, setting: Setting, *, width: int = 128) -> Contest:
    i = torch.arange(s.S)
    mask = (i[:, None] - i[None, :]).abs() <= width
    others = {}
    if setting.peers and not s.train:
        others["flex_attention"] = peers.flex(s.S, keep=lambda b, h, i, j: (i - j).abs() <= width)
    return contest_of(
        s,
        lambda q, k, v: F.scaled_dot_product_attention(q, k, v, attn_mask=mask),
        lambda q, k, v: fastattn.attention(q, k, v, window=(width, width), backend=setting.backend),
        pairs=float(s.B * s.H * int(mask.sum())),
        others=others,
    )


def causal_window(s: Shape, setting: Setting, *, width: int = 128) -> Contest:
    i = torch.arange(s.S)
    distance = i[:, None] - i[None, :]
    mask = (distance >= 0) & (distance <= width)
    return contest_of(
        s,
        lambda q, k, v: F.scaled_dot_product_attention(q, k, v, attn_mask=mask),
        lambda q, k, v: fastattn.attention(
            q, k, v, causal=True, window=(width, 0), backend=setting.backend
        ),
        pairs=float(s.B * s.H * int(mask.sum())),
    )


def padded_lengths(B: int, S: int) -> Tensor:
    """Valid keys of a padded batch: spread evenly from S / 8 to 7 S / 8, so half on average."""
    return torch.linspace(S / 8, 7 * S / 8, B).round().to(torch.int32)


def padded(s: Shape, setting: Setting) -> Contest:
    lens = padded_lengths(s.B, s.S)
    mask = (torch.arange(s.S)[None, :] < lens[:, None])[:, None, None, :]
    return contest_of(
        s,
        lambda q, k, v: F.scaled_dot_product_attention(q, k, v, attn_mask=mask),
        lambda q, k, v: fastattn.attention(q, k, v, k_lens=lens, backend=setting.backend),
        pairs=float(s.H * s.rows * int(lens.sum())),
    )


def packed(s: Shape, setting: Setting) -> Contest:
    """B sequences of 32 … S tokens: SDPA on the padded batch, ours on the packed tokens."""
    lens = torch.linspace(32, s.S, s.B).round().to(torch.int32)
    valid = torch.arange(s.S)[None, :] < lens[:, None]
    mask = valid[:, None, None, :]
    cu = F.pad(lens.cumsum(0, dtype=torch.int32), (1, 0))
    q, k, v, do = tensors(replace(s, train=False))
    flat = [t.transpose(1, 2)[valid].contiguous() for t in (q, k, v, do)]  # (T, H, D)
    for t in (q, k, v, *flat[:3]):
        t.requires_grad_(s.train)
    pq, pk, pv, pdo = flat
    per_pair = (FWD_FLOPS + (BWD_FLOPS if s.train else 0)) * s.D
    return Contest(
        stock=step(
            lambda q, k, v: F.scaled_dot_product_attention(q, k, v, attn_mask=mask),
            [q, k, v],
            [do],
            s.train,
        ),
        fused=step(
            lambda q, k, v: fastattn.attention_varlen(q, k, v, cu, cu, backend=setting.backend),
            [pq, pk, pv],
            [pdo],
            s.train,
        ),
        flops=float(s.H * int((lens.long() ** 2).sum())) * per_pair,
        flops_dense=float(s.B * s.H * s.S * s.S) * per_pair,
        bytes=float(4 * pq.numel() * s.item),
        operands=float(4 * pq.numel() * s.item),
        sdpa=True,
    )


def biased(s: Shape, setting: Setting, *, heads: int) -> Contest:
    bias = torch.randn(1, heads, s.S, s.S).to(DTYPES[s.dtype]).requires_grad_(s.train)
    return contest_of(
        s,
        lambda q, k, v: F.scaled_dot_product_attention(q, k, v, attn_mask=bias),
        lambda q, k, v: fastattn.attention(q, k, v, bias=bias, backend=setting.backend),
        extra=bias if s.train else None,
    )


def alibi(s: Shape, setting: Setting) -> Contest:
    slopes = 2.0 ** (-8.0 * torch.arange(1, s.H + 1) / s.H)
    i = torch.arange(s.S)
    bias = (-slopes[:, None, None] * (i[:, None] - i[None, :]).abs()).to(DTYPES[s.dtype])[None]
    others = {}
    if setting.peers:
        others["flex_attention"] = peers.flex(
            s.S, score=lambda x, b, h, i, j: x - slopes[h] * (i - j).abs()
        )
    return contest_of(
        s,
        lambda q, k, v: F.scaled_dot_product_attention(q, k, v, attn_mask=bias),
        lambda q, k, v: fastattn.attention(q, k, v, alibi_slopes=slopes, backend=setting.backend),
        others=others,
    )


def _case(
    name: str, what: str, fn: Callable[..., Contest], s: Shape, kind: str = "", **targets: object
) -> Case:
    return Case(
        name=name,
        what=what,
        dtype=s.dtype,
        make=functools.partial(fn, s),
        tag=kind or "table",
        **targets,  # type: ignore[arg-type]
    )


def _dense() -> list[Case]:
    rows = []
    for S, fwd, both in ((2048, 2.0, 2.5), (512, 1.5, 2.0)):
        s = Shape(S=S, dtype="bf16")
        make = functools.partial(plain, slow=S == 512)
        rows.append(_case(f"bf16_fwd_{S}", f"bf16 forward S={S}", make, s, ratio=fwd, share=0.6))
        s = replace(s, train=True)
        rows.append(
            _case(f"bf16_train_{S}", f"bf16 fwd+bwd S={S}", plain, s, ratio=both, share=0.5)
        )
    s = Shape()
    make = functools.partial(plain, slow=True)
    rows.append(_case("fp32_fwd_2048", "fp32 forward S=2048", make, s, ratio=1.05, share=0.85))
    s = replace(s, train=True)
    rows.append(_case("fp32_train_2048", "fp32 fwd+bwd S=2048", plain, s, ratio=1.25, share=0.85))
    for dtype in ("bf16", "fp32"):
        s = Shape(dtype=dtype, train=True, causal=True)
        what = f"causal {dtype} fwd+bwd S=2048"
        rows.append(_case(f"{dtype}_causal_train_2048", what, plain, s, ratio=1.4))
    return rows


def _masked() -> list[Case]:
    what = "sliding window 128, fp32 fwd S=2048"
    rows = [_case("fp32_window_fwd_2048", what, window, Shape(), ratio=8.0)]
    for dtype in ("bf16", "fp32"):
        s = Shape(B=8, S=512, dtype=dtype)
        what = f"half the keys padded, {dtype} fwd B=8 S=512"
        rows.append(_case(f"{dtype}_padded_fwd_512", what, padded, s, ratio=1.7))
        for train in (False, True):
            mode, word = ("train", "fwd+bwd") if train else ("fwd", "fwd")
            what = f"packed 8 of 32…512 against padded, {dtype} {word}"
            row = _case(f"{dtype}_packed_{mode}", what, packed, replace(s, train=train), ratio=2.0)
            rows.append(row)
        s = Shape(S=1024, dtype=dtype, train=True)
        for heads in (12, 1):
            what = f"bias (1,{heads},S,S) with gradient, {dtype} fwd+bwd S=1024"
            make = functools.partial(biased, heads=heads)
            rows.append(_case(f"{dtype}_bias{heads}_train_1024", what, make, s, ratio=2.0))
    return rows


def _decode() -> list[Case]:
    rows = []
    for dtype in ("bf16", "fp32"):
        s = Shape(H=32, Hk=8, Sq=1, S=4096, dtype=dtype)
        what = f"Sq=1 Sk=4096 GQA 32/8, {dtype} fwd"
        rows.append(_case(f"{dtype}_decode_gqa_4096", what, plain, s, ratio=1.5, roof="copy"))
    return rows


def _beside() -> list[Case]:
    """Rows that the issue has no floor for and users ask about."""
    rows = []
    for dtype in ("bf16", "fp32"):
        s = Shape(dtype=dtype, causal=True)
        make = functools.partial(plain, slow=dtype == "fp32")
        what = f"causal {dtype} fwd S=2048"
        rows.append(_case(f"{dtype}_causal_fwd_2048", what, make, s, "beside"))
        s = Shape(dtype=dtype, train=True)
        what = f"sliding window 128, {dtype} fwd+bwd S=2048"
        rows.append(_case(f"{dtype}_window_train_2048", what, window, s, "beside"))
        what = f"causal window 128, {dtype} fwd S=2048"
        s = Shape(dtype=dtype)
        rows.append(_case(f"{dtype}_causal_window_fwd_2048", what, causal_window, s, "beside"))
        what = f"ALiBi, {dtype} fwd S=2048"
        rows.append(_case(f"{dtype}_alibi_fwd_2048", what, alibi, s, "beside"))
        what = f"head_dim 128, {dtype} fwd S=2048"
        s = replace(s, D=128)
        rows.append(_case(f"{dtype}_d128_fwd_2048", what, plain, s, "beside"))
        what = f"MiniLM layer B=8 H=12 S=128 D=32, {dtype} fwd"
        s = Shape(B=8, S=128, D=32, dtype=dtype)
        rows.append(_case(f"{dtype}_minilm_fwd_128", what, plain, s, "beside"))
    s = Shape(dtype="bf16")
    rows.append(_case("bf16_window_fwd_2048", "sliding window 128, bf16 fwd", window, s, "beside"))
    s = Shape(dtype="fp16")
    rows.append(_case("fp16_fwd_2048", "fp16 forward S=2048", plain, s, "beside"))
    return rows


def _small() -> list[Case]:
    """Below 200 us: what counts is the microseconds that we add to a call."""
    rows = []
    for dtype in ("bf16", "fp32"):
        for B, H, S, D in ((1, 1, 1, 64), (1, 12, 1, 64), (1, 12, 16, 32), (1, 12, 32, 64)):
            for train in (False, True):
                s = Shape(B=B, H=H, S=S, D=D, dtype=dtype, train=train)
                mode, word = ("train", "fwd+bwd") if train else ("fwd", "fwd")
                name = f"{dtype}_tiny_b{B}h{H}s{S}d{D}_{mode}"
                what = f"B{B} H{H} S{S} D{D} {dtype} {word}"
                rows.append(_case(name, what, plain, s, "small", max_overhead=40e-6))
    return rows


def _memory() -> list[Case]:
    rows = []
    for dtype in ("bf16", "fp32"):
        for train in (False, True):
            s = Shape(S=8192, dtype=dtype, train=train)
            mode, word = ("train", "fwd+bwd") if train else ("fwd", "fwd")
            what = f"peak extra memory, {dtype} {word} S=8192"
            rows.append(_case(f"{dtype}_memory_{mode}", what, plain, s, "memory", memory=2.0))
    return rows


CASES: dict[str, Case] = {
    case.name: case
    for group in (_dense, _masked, _decode, _beside, _small, _memory)
    for case in group()
}
