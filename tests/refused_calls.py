"""Calls of an attention op that must be refused before anything is launched: what every GPU
backend's op says. The public functions have words of their own (test_attention_errors.py)."""

from typing import Any

import torch
from torch import Tensor

from fastattn.ops.attention_op import Shared


def qkv(*shape: int, **more: Any) -> tuple[Tensor, Tensor, Tensor]:
    q, k, v = (torch.randn(shape or (1, 2, 9, 8), **more) for _ in range(3))
    return q, k, v


def arguments(*qkv: Tensor, **given: Any) -> tuple[Any, ...]:
    """Of attention_{cuda,triton}_fwd: q, k, v and the shared arguments in the schema's order."""
    values: dict[str, Any] = dict.fromkeys(Shared.__slots__[:9])
    values |= {"scale": 0.25, "causal": 0, "window_left": -1, "window_right": -1, "softcap": 0.0}
    values |= {"dropout_p": 0.0, "weights": 0, "max_seqlen_q": 9, "max_seqlen_k": 9}
    values |= {"deterministic": True} | given
    assert list(values) == list(Shared.__slots__)
    return (*qkv, *values.values())


def refused() -> list[tuple[str, tuple[Any, ...]]]:
    """(what the message must contain, a regular expression; the arguments)."""
    q, k, v = qkv()
    cu = torch.tensor([0, 9])
    p = [torch.randn(9, 2, 8) for _ in range(3)]
    both = {"cu_seqlens_q": cu, "cu_seqlens_k": cu}
    return [
        ("must have 4 dimensions, got 3", arguments(q, k[0], v)),
        ("must have 3 dimensions, got 4", arguments(q, k, v, **both)),
        ("k must have head_dim 8", arguments(q, k[..., :7], v)),
        ("v must have k's length 9, got 5", arguments(q, k, v[:, :, :5])),
        ("v must have k's 2 heads, got 1", arguments(q, k, v[:, :1])),
        ("one batch size", arguments(q, k.expand(2, -1, -1, -1), v)),
        ("multiple of k's", arguments(q, *qkv(1, 3, 9, 8)[1:])),
        ("one dtype", arguments(q, k.half(), v)),
        ("head_dim", arguments(*qkv(1, 1, 4, 300))),
        ("mask must be bool", arguments(q, k, v, mask=torch.ones(9, 9))),
        ("mask dimension 1 must be 1 or 9", arguments(q, k, v, mask=torch.ones(9, 8) > 0)),
        ("bias dimension 0 must be 1 or 9, got 3", arguments(q, k, v, bias=torch.ones(3, 9))),
        ("bias must have at most 4", arguments(q, k, v, bias=torch.ones(1, 1, 1, 9, 9))),
        ("q_lens must have shape", arguments(q, k, v, q_lens=torch.tensor([1, 2]))),
        ("k_lens must be int32 or int64", arguments(q, k, v, k_lens=torch.tensor([1.0]))),
        ("alibi_slopes must have shape", arguments(q, k, v, alibi_slopes=torch.ones(3))),
        ("sinks must have shape", arguments(q, k, v, sinks=torch.ones(3))),
        ("dropout needs seed", arguments(q, k, v, dropout_p=0.5)),
        (r"dropout_p must be in \[0, 1\)", arguments(q, k, v, dropout_p=1.0)),
        ("causal must be 0, 1 or 2", arguments(q, k, v, causal=3)),
        ("weights must be 0, 1 or 2", arguments(q, k, v, weights=7)),
        ("cu_seqlens_k must come with", arguments(*p, cu_seqlens_q=cu)),
        (
            "cu_seqlens_k must have shape",
            arguments(*p, cu_seqlens_q=cu, cu_seqlens_k=torch.tensor([0, 1, 2])),
        ),
        ("v must have k's 9 tokens", arguments(p[0], p[1], p[2][:5], **both)),
        ("must not be negative", arguments(*p, **both, max_seqlen_k=-1)),
        ("max_seqlen_q must be at most", arguments(*p, **both, max_seqlen_q=2**31 - 1)),
        ("max_seqlen_k must be at most", arguments(*p, **both, max_seqlen_k=2**62)),
        (
            "k's length must be at most",
            arguments(q, *(x[:, :, :1].expand(-1, -1, 2**31, -1) for x in (k, v))),
        ),
    ]


def refused_backward() -> list[tuple[str, tuple[Any, ...]]]:
    """The same for attention_{cuda,triton}_bwd: what comes with a forward's arguments."""
    q, k, v = qkv()
    o, lse, w = torch.zeros(1, 2, 9, 8), torch.zeros(1, 2, 9), torch.zeros(1, 2, 9, 9)

    def call(
        do: Any = o, dlse: Any = None, dw: Any = None, out: Any = o, saved: Any = (lse, lse)
    ) -> tuple[Any, ...]:
        weights = {"weights": 1} if dw is not None else {}
        return (do, dlse, dw, q, k, v, out, *saved, *arguments(**weights), 7)

    return [
        ("lse", call(saved=(lse[..., :8], lse))),
        ("lse", call(saved=(lse, lse.double()))),
        ("do must have the shape", call(do=o[..., :7])),
        ("do must have the shape", call(do=o.half())),
        ("o must have the shape", call(out=o[:, :1])),
        ("o must be given with do", call(out=None)),
        ("dlse must have lse's shape", call(do=None, dlse=lse[:, :1])),
        ("dweights must have the weights'", call(do=None, dw=w[..., :8])),
    ]
