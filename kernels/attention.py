"""Launchers of the Triton attention kernels: allocate, choose tiles, launch.

Padded calls have q (B, H, Sq, D), k (B, Hk, Sk, D), v (B, Hk, Sk, Dv); packed ones, which
``cu_seqlens_q`` tells, (Tq, H, D), (Tk, Hk, D), (Tk, Hk, Dv). Any strides. Nothing is read back
from the device. Memory beside the results: 8 bytes a row (delta and lse) in the backward, the
partial sums of a broadcast bias gradient, 4 D bytes a row of dq with ``deterministic=False``.
"""

from __future__ import annotations

import ctypes
import math
from typing import Any

import torch
from torch import Tensor

from fastattn.kernels import attention_bwd as bwd
from fastattn.kernels import attention_fwd as fwd
from fastattn.kernels import checks, configs
from fastattn.kernels.contract import (
    NEED_DBIAS,
    NEED_DK,
    NEED_DQ,
    NEED_DSINKS,
    NEED_DV,
    WEIGHTS_MEAN,
    WEIGHTS_NONE,
    empty_as,
)
from fastattn.kernels.launch import device_of, launch

_LOG2E = 1.4426950408889634
_TINY = torch.finfo(torch.float32).tiny
_F32 = torch.float32
MAX_HEAD_DIM = configs.BUCKETS[-1]


def attention_forward(
    q: Tensor, k: Tensor, v: Tensor, *shared: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """o, lse, lse_lo and weights (empty unless asked for) of ``fastattn::attention_triton_fwd``.

    Args:
        shared: mask, bias, q_lens, k_lens, cu_seqlens_q, cu_seqlens_k, alibi_slopes, sinks, seed
            (tensors or None), scale, causal, window_left, window_right, softcap, dropout_p,
            weights, max_seqlen_q, max_seqlen_k, as in the op's schema.

    Returns:
        o in q's dtype and memory order; lse, natural log, and lse_lo (what fp32 lse rounds away, in
        log2), both fp32 (B, H, Sq) or (H, Tq); weights (B, H, Sq, Sk), or (B, Sq, Sk) for the mean.
    """
    call = _Call(q, k, v, shared)
    o = empty_as(q, (*q.shape[:-1], v.shape[-1]))
    lse = q.new_empty(call.lse_shape, dtype=_F32)
    lse_lo = torch.empty_like(lse)
    if call.packed:  # tokens of no sequence
        o.zero_()
        lse.fill_(-math.inf)
        lse_lo.zero_()
    values = call.values | {
        "o_ptr": o, "stride_o": call.strides(o), "lse_ptr": lse, "lse_lo_ptr": lse_lo,
    }  # fmt: skip
    with device_of(q):
        call.run(fwd.forward_kernel, call.row_tiles, "fwd", values)
        weights = _weights(call, values)
    return o, lse, lse_lo, weights


def _weights(call: _Call, values: dict[str, Any]) -> Tensor:
    if call.weights == WEIGHTS_NONE:
        return call.q.new_empty((0,))
    w = call.q.new_empty(call.weights_shape)
    mean = call.weights == WEIGHTS_MEAN
    values = values | {
        "w_ptr": w, "stride_w": _weights_strides(w), "heads": call.H if mean else 1,
    }  # fmt: skip
    outer = call.B * (1 if mean else call.H)
    call.run(fwd.weights_kernel, call.square_tiles(outer), "rows", values)
    return w


def attention_backward(
    do: Tensor | None,
    dlse: Tensor | None,
    dweights: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    o: Tensor | None,
    lse: Tensor,
    lse_lo: Tensor,
    *shared: Any,
    need: int,
    deterministic: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """dq, dk, dv, dbias, dsinks; those that ``need`` does not ask for are empty.

    Args:
        do, dlse, dweights: upstream gradients of o, lse and weights, None = 0; any strides.
        o: may be None where do is None or only dv is needed. lse, lse_lo: the forward's.
        shared: as in :func:`attention_forward`.
        need: bits NEED_*.
        deterministic: True: no atomics, bitwise repeatable. False: dq (and a bias gradient that
            heads share) by fp32 atomics in the pass that makes dk and dv.
    """
    call = _Call(q, k, v, shared)
    if call.weights == WEIGHTS_NONE:
        dweights = None
    shapes = ((*q.shape[:-1], v.shape[-1]), call.lse_shape, call.weights_shape)
    saved = (do, dlse, dweights), o, lse, lse_lo
    checks.check_saved(*saved, shapes, q.dtype, needs_o=bool(need & ~NEED_DV))
    lse, lse_lo = lse.contiguous(), lse_lo.contiguous()
    empty = q.new_empty((0,))

    def result(x: Tensor, bit: int) -> Tensor | None:
        if not need & bit:
            return None
        grad = empty_as(x, tuple(x.shape))
        return grad.zero_() if call.packed else grad  # tokens of no sequence

    dq, dk, dv = result(q, NEED_DQ), result(k, NEED_DK), result(v, NEED_DV)
    bias, sinks = call.values["bias_ptr"], call.values["sinks_ptr"]
    dbias = _BiasGrad(call, bias if need & NEED_DBIAS else None, deterministic)
    delta = torch.empty_like(lse)
    # Packed: what tokens of no sequence hold, for they are in no tile.
    lse_units = torch.full_like(lse, math.inf) if call.packed else torch.empty_like(lse)
    heads_in_mean = call.H if call.weights == WEIGHTS_MEAN else 1
    values = call.values | {
        "o_ptr": o, "stride_o": call.strides(o), "do_ptr": do, "stride_do": call.strides(do),
        "dlse_ptr": dlse, "stride_dlse": (0, 0, 0) if dlse is None else (0, 0, *dlse.stride())[-3:],
        "dw_ptr": dweights, "stride_dw": _weights_strides(dweights),
        "dw_scale": 1.0 / max(heads_in_mean, 1),
        "lse_ptr": lse, "lse_lo_ptr": lse_lo, "delta_ptr": delta, "lse_units_ptr": lse_units,
    }  # fmt: skip
    with device_of(q):
        call.run(bwd.prepare_kernel, call.row_tiles, "rows", values)
        values["lse_ptr"] = lse_units
        by_keys, by_rows = dk is not None or dv is not None, dq is not None
        fused = not deterministic and by_keys and by_rows
        sums = q.new_zeros((*call.lse_shape, q.shape[-1]), dtype=_F32) if fused else None
        values |= {"dbias_ptr": dbias.buffer, "stride_dbias": dbias.strides}
        if by_keys or dbias.mode == bwd.DBIAS_KEYS:
            values |= {
                "dk_ptr": dk, "stride_dk": call.strides(dk), "dv_ptr": dv,
                "stride_dv": call.strides(dv), "dq_ptr": sums,
                "DBIAS": dbias.take(bwd.DBIAS_KEYS, everything=fused),
            }  # fmt: skip
            call.run(bwd.by_keys_kernel, call.key_tiles, "fused" if fused else "keys", values)
        if (by_rows and not fused) or dbias.wants(bwd.DBIAS_STORE, bwd.DBIAS_ROWS):
            values |= {
                "dq_ptr": None if fused else dq, "stride_dq": call.strides(dq),
                "DBIAS": dbias.take(bwd.DBIAS_STORE, bwd.DBIAS_ROWS),
            }  # fmt: skip
            call.run(bwd.by_rows_kernel, call.row_tiles, "rows", values)
        if dbias.wants(bwd.DBIAS_SHARED):
            values |= {"bias_b": dbias.shape[0], "bias_h": dbias.shape[1]}
            tiles = call.square_tiles(dbias.shape[0] * dbias.shape[1])
            call.run(bwd.dbias_kernel, tiles, "rows", values)
        dsinks = _dsinks(call, values) if need & NEED_DSINKS and sinks is not None else empty
        if sums is not None and dq is not None:
            dq.copy_(sums.transpose(0, 1) if call.packed else sums)

    def or_empty(x: Tensor | None) -> Tensor:
        return empty if x is None else x

    return or_empty(dq), or_empty(dk), or_empty(dv), or_empty(dbias.finish()), dsinks


def _dsinks(call: _Call, values: dict[str, Any]) -> Tensor:
    sinks: Tensor = values["sinks_ptr"]
    dsinks = torch.empty_like(sinks)
    rows = values["lse_ptr"].shape[-1]
    values = values | {
        "dsinks_ptr": dsinks, "B": 1 if call.packed else call.B, "rows_total": rows,
        "stride_b": 0 if call.packed else call.H * rows, "BLOCK": 1024 if sinks.is_cuda else 32,
    }  # fmt: skip
    call.run(bwd.dsinks_kernel, lambda config: call.H, "rows", values)
    return dsinks


class _BiasGrad:
    """Where the gradient of a bias is summed: see the head of attention_bwd.py."""

    def __init__(self, call: _Call, bias: Tensor | None, deterministic: bool) -> None:
        self.bias, self.mode = bias, bwd.DBIAS_NONE
        self.buffer: Tensor | None = None
        self.strides: tuple[int, ...] = (0, 0, 0, 0)
        self.pending = False
        if bias is None:
            return
        full = (call.B, call.H, call.Sq, call.Sk)
        self.shape = (*(1,) * (4 - bias.dim()), *bias.shape)
        nb, nh, ni, nj = self.shape
        shape, dtype = self.shape, _F32
        if nj == 1 < full[3] or ni == nj == 1:
            self.mode, shape = bwd.DBIAS_ROWS, (*full[:3], 1)
        elif ni == 1 < full[2]:
            self.mode, shape = bwd.DBIAS_KEYS, (*full[:2], 1, full[3])
        elif (nb, nh) == full[:2]:
            self.mode, dtype = bwd.DBIAS_STORE, bias.dtype
        else:
            self.mode = bwd.DBIAS_SHARED
            dtype = bias.dtype if deterministic else _F32
        # Skipped tiles and, for atomics, the start: zero. SHARED alone writes every element.
        make = bias.new_zeros
        if self.mode == bwd.DBIAS_SHARED and deterministic:
            make = bias.new_empty
        self.buffer = make(shape, dtype=dtype)
        self.strides = tuple(
            0 if n == 1 else s for n, s in zip(shape, self.buffer.stride(), strict=True)
        )
        self.pending = True

    def wants(self, *modes: int) -> bool:
        return self.pending and self.mode in modes

    def take(self, *modes: int, everything: bool = False) -> int:
        """The mode for a kernel that serves ``modes``, which then is done."""
        if not self.pending or not (everything or self.mode in modes):
            return bwd.DBIAS_NONE
        self.pending = False
        return self.mode

    def finish(self) -> Tensor | None:
        if self.buffer is None or self.bias is None:
            return None
        total = self.buffer.sum_to_size(self.shape) if self.buffer.numel() else self.buffer
        if total.shape != self.shape:  # an empty call
            total = self.buffer.new_zeros(self.shape)
        return total.reshape(self.bias.shape).to(self.bias.dtype)


class _Call:
    """One problem in the words of the kernels: their arguments by name, and their grids."""

    def __init__(self, q: Tensor, k: Tensor, v: Tensor, shared: tuple[Any, ...]) -> None:
        mask, bias, q_lens, k_lens, cu_q, cu_k, alibi, sinks, seed = shared[:9]
        scale, causal, left, right, softcap, dropout_p, weights, max_q, max_k = shared[9:18]
        checks.check_dims(q, k, v, cu_q, cu_k, (max_q, max_k))
        self.q, self.packed, self.weights = q, cu_q is not None, weights
        self.H, heads_k = q.shape[1], k.shape[1]
        self.D, self.Dv = q.shape[-1], v.shape[-1]
        if self.packed:
            self.B = cu_q.shape[0] - 1
            self.Tq, self.Tk = q.shape[0], k.shape[0]
            self.Sq, self.Sk = min(max_q, self.Tq), min(max_k, self.Tk)
            if mask is not None or bias is not None or weights:
                self.Sq, self.Sk = max_q, max_k
            self.lse_shape: tuple[int, ...] = (self.H, self.Tq)
        else:
            self.B, self.Tq, self.Tk = q.shape[0], 0, 0
            self.Sq, self.Sk = q.shape[2], k.shape[2]
            self.lse_shape = (self.B, self.H, self.Sq)
        checks.check_call(q, k, v, shared, (self.B, self.H, self.Sq, self.Sk))
        self.heads_k = heads_k
        self.family = configs.family_of(q.device)
        plain = scale >= _TINY and not softcap and alibi is None and bias is None
        # What needs registers beside those of the products.
        self.laden = not plain or mask is not None or dropout_p > 0 or weights != WEIGHTS_NONE
        scale = ctypes.c_float(scale).value
        unit = scale if plain else 1.0
        furthest = self.Sq + self.Sk
        self.values: dict[str, Any] = {
            "q_ptr": q, "k_ptr": k, "v_ptr": v, "mask_ptr": mask, "bias_ptr": bias,
            "q_lens_ptr": _flat(q_lens), "k_lens_ptr": _flat(k_lens), "cu_q_ptr": _flat(cu_q),
            "cu_k_ptr": _flat(cu_k), "alibi_ptr": alibi, "sinks_ptr": _flat(sinks),
            "seed_ptr": seed if dropout_p > 0 else None,
            "stride_q": self.strides(q), "stride_k": self.strides(k), "stride_v": self.strides(v),
            "stride_mask": _broadcast_strides(mask), "stride_bias": _broadcast_strides(bias),
            "stride_alibi": (0, 0) if alibi is None else (0, *alibi.stride())[-2:],
            "H": self.H, "group": max(self.H // max(heads_k, 1), 1), "B": self.B,
            "Sq": self.Sq, "Sk": self.Sk, "Tq": self.Tq, "Tk": self.Tk,
            "scale": scale, "unit": unit, "c": ctypes.c_float(unit * _LOG2E).value,
            "softcap": softcap or None,
            "window_left": None if left < 0 else min(left, furthest),
            "window_right": None if right < 0 else min(right, furthest),
            "threshold": round(dropout_p * 2**32) if dropout_p > 0 else None,
            "keep_scale": 1.0 / (1.0 - dropout_p),
            "D": self.D, "Dv": self.Dv, "BLOCK_D": _block(self.D), "BLOCK_DV": _block(self.Dv),
            "CAUSAL": causal, "PLAIN": plain, "PRECISION": "ieee",
            "WIDE": q.dtype == torch.float16,
            "CHUNK": _chunk(q.dtype, self.D), "CHUNK_V": _chunk(q.dtype, self.Dv),
        }  # fmt: skip

    @property
    def weights_shape(self) -> tuple[int, ...]:
        square = (self.Sq, self.Sk)
        return (self.B, *square) if self.weights == WEIGHTS_MEAN else (self.B, self.H, *square)

    def strides(self, x: Tensor | None) -> tuple[int, ...]:
        """(batch, head, row, column) strides of a (B, H, S, D) or packed (T, H, D) tensor."""
        if x is None:
            return (0, 0, 0, 0)
        if self.packed:
            t, h, d = x.stride()
            return (0, h, t, d)
        return x.stride()

    # Grids are one-dimensional: y and z end at 65535.
    def row_tiles(self, config: configs.Config) -> int:
        if self.packed:
            return self.H * (self.Tq // config.BLOCK_M + self.B) if self.B else 0
        return self.B * self.H * -(-self.Sq // config.BLOCK_M)

    def key_tiles(self, config: configs.Config) -> int:
        if self.packed:
            return self.heads_k * (self.Tk // config.BLOCK_N + self.B) if self.B else 0
        return self.B * self.heads_k * -(-self.Sk // config.BLOCK_N)

    def square_tiles(self, outer: int) -> Any:
        """A grid of ``outer`` times the tiles of (Sq, Sk)."""
        return lambda config: outer * -(-self.Sq // config.BLOCK_M) * -(-self.Sk // config.BLOCK_N)

    def run(self, kernel: Any, tiles: Any, work: str, values: dict[str, Any]) -> None:
        config = configs.config(self.family, self.q.dtype, self.D, self.Dv, work, self.laden)
        n = tiles(config)
        if n == 0:
            return
        values = values | {"BLOCK_M": config.BLOCK_M, "BLOCK_N": config.BLOCK_N}
        launch(
            kernel,
            (n,),
            *[values[name] for name in kernel.arg_names],
            num_warps=config.num_warps,
            num_stages=config.num_stages,
        )


def _block(width: int) -> int:
    """The power of two that holds a head dim; tensor cores want 16."""
    return max(16, 1 << (width - 1).bit_length())


def _chunk(dtype: torch.dtype, width: int) -> int:
    """Columns that a backward product reduces at once: fp32 operands live in registers."""
    return min(_block(width), 64) if dtype == torch.float32 else _block(width)


def _flat(x: Tensor | None) -> Tensor | None:
    return None if x is None else x.contiguous()


def _broadcast_strides(x: Tensor | None) -> tuple[int, ...]:
    """Strides of x as a view of (B, H, Sq, Sk): 0 where it is broadcast."""
    if x is None:
        return (0, 0, 0, 0)
    own = (0 if n == 1 else s for n, s in zip(x.shape, x.stride(), strict=True))
    return (*(0,) * (4 - x.dim()), *own)


def _weights_strides(x: Tensor | None) -> tuple[int, ...]:
    if x is None:
        return (0, 0, 0, 0)
    if x.dim() == 3:  # the mean: one for all heads
        b, i, j = x.stride()
        return (b, 0, i, j)
    return x.stride()
