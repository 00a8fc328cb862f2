"""What the Triton kernels of layernorm_ffn and its parts want of a call's shapes: the checks of
csrc/bindings/{row_args.h,layernorm*.cpp} in Python, in their words. The public functions check
before they get here; a direct call of an op does not, and must not leave its tensors either."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastattn.kernels.rows import DTYPES

NORM, ACT, FFN = "add_layer_norm", "bias_act", "layernorm_ffn"


def check(right: bool, op: str, *words: object) -> None:
    if not right:
        raise ValueError(f"fastattn::{op}: {''.join(map(str, words))}")


def check_rows(op: str, name: str, x: Tensor, columns: int) -> None:
    """The last dimensions have ``columns`` elements."""
    check(x.dtype in DTYPES, op, name, " must be float32, bfloat16 or float16 for the kernels")
    width = 1
    for n in reversed(x.shape):
        if width >= columns:
            break
        width *= n
    check(columns > 0 and width == columns, op, "the last dimensions of ", name, " must have ",
          columns, " elements, got shape ", tuple(x.shape))  # fmt: skip


def check_same(op: str, name: str, given: Tensor | None, x: Tensor, of: str = "x") -> None:
    if given is not None:
        check(given.shape == x.shape, op, name, " must have ", of, "'s shape ", tuple(x.shape),
              ", got ", tuple(given.shape))  # fmt: skip
        check(given.dtype in DTYPES, op, name,
              " must be float32, bfloat16 or float16 for the kernels")  # fmt: skip


def check_vector(op: str, name: str, given: Tensor | None, columns: int) -> None:
    if given is not None:
        check(given.numel() == columns, op, name, " must have ", columns, " elements, got shape ",
              tuple(given.shape))  # fmt: skip
        check(given.dtype in DTYPES, op, name,
              " must be float32, bfloat16 or float16 for the kernels")  # fmt: skip


def check_dropout(op: str, p: float, seed: Tensor | None) -> None:
    check(0.0 <= p < 1.0, op, "dropout must be in [0, 1), got ", p)
    if p > 0.0:
        whole = seed is not None and seed.dtype == torch.int64 and seed.numel() == 1
        check(whole, op, "dropout needs seed, a 1-element int64 tensor")


def check_stats(op: str, norm: int, mean: Tensor, rstd: Tensor, rows: int) -> None:
    check(norm in (0, 1, 2), op, "norm must be 0, 1 or 2")
    if norm:
        right = rstd.numel() == rows and (norm == 2 or mean.numel() == rows)
        fp32 = rstd.dtype == mean.dtype == torch.float32
        check(right and fp32 and mean.is_contiguous() and rstd.is_contiguous(), op,
              "mean and rstd must be the forward's")  # fmt: skip


def check_ffn(tensors: tuple[Any, ...], n: Any) -> None:
    """n: kernels.layernorm_ffn.Numbers."""
    x, w1, b1, w2, b2, w_gate, b_gate, norm_weight, norm_bias, seed = tensors
    for name, w in (("w1", w1), ("w2", w2), ("w_gate", w_gate)):
        if w is not None:
            check(w.dim() == 2 and w.numel() > 0, FFN, name, " must have shape (out, in), got ",
                  tuple(w.shape))  # fmt: skip
            check(w.dtype in DTYPES and w.dtype == w1.dtype, FFN, name, " must have w1's dtype ",
                  "float32, bfloat16 or float16, got ", w.dtype)  # fmt: skip
    (hidden, columns), out = w1.shape, w2.shape[0]
    check(w2.shape[1] == hidden, FFN, "w2 must have ", hidden, " columns to match w1 ",
          tuple(w1.shape), ", got ", tuple(w2.shape))  # fmt: skip
    check(x.dim() > 0 and x.shape[-1] == columns, FFN, "x must have ", columns,
          " columns to match w1 ", tuple(w1.shape), ", got ", tuple(x.shape))  # fmt: skip
    check(not n.residual or out == columns, FFN, "the residual needs w2 with ", columns,
          " rows to match x ", tuple(x.shape), ", got ", tuple(w2.shape))  # fmt: skip
    check(x.dtype in (w1.dtype, torch.float32), FFN, "x must be float32 or have w1's dtype")
    if w_gate is not None:
        check(w_gate.shape == w1.shape, FFN, "w_gate must have w1's shape ", tuple(w1.shape),
              ", got ", tuple(w_gate.shape))  # fmt: skip
    check(n.norm in (0, 1, 2) and 0 <= n.act <= 5, FFN, "norm or act out of range")
    normed = columns if n.pre_norm else out
    sizes = {"b1": (b1, hidden), "b2": (b2, out), "b_gate": (b_gate, hidden)}
    sizes |= {"norm_weight": (norm_weight, normed), "norm_bias": (norm_bias, normed)}
    for name, (vector, size) in sizes.items():
        check_vector(FFN, name, vector, size)
    check_dropout(FFN, n.dropout_p, seed)
    check_dropout(FFN, n.hidden_dropout_p, seed)


def check_ffn_saved(dy: Tensor, saved: tuple[Tensor, ...], c: Any) -> None:
    """c: kernels.layernorm_ffn.Call."""
    s, mean, rstd, u, g, a = saved
    right = dy.shape == c.out_shape and dy.dtype == c.x_dtype
    check(right, FFN, "dy must have the output's shape and dtype, got ", tuple(dy.shape))
    for name, x in (("s", s), ("u", u), ("g", g), ("a", a)):
        numel, dtype = (c.M * c.Dout, c.x_dtype) if name == "s" else (c.M * c.F, c.dtype)
        right = x.numel() == numel and x.is_contiguous() and x.dtype == dtype
        check(x.numel() == 0 or right, FFN, name, " must be the forward's")
    check(c.post == 0 or s.numel() == c.M * c.Dout, FFN, "s must be the forward's")
    check(c.w_gate is None or u.numel() == g.numel(), FFN, "g must be the forward's")
    check_stats(FFN, c.n.norm, mean, rstd, c.M)
