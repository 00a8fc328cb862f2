"""The recurrence of LSTM, GRU and RNN, one layer, after the product of its inputs: tiers and
launchers. Semantics: fastattn/reference/recurrent.py.

T steps, B sequences, H hidden units, P features of h (P = H without a projection), D directions,
G gates, N rows of gx and y. Tiers, taken by :func:`whole_sequence`:

    recurrent_sequence.py   one launch, a program runs all steps of its sequences
    recurrent_steps.py      one launch a step, for what is larger

No atomics; sums in an order that the shape alone decides, so results are bitwise the same every
time. Nothing is read back from the device, and all is allocated before the first launch.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import triton
from torch import Tensor

from fastattn.kernels import configs
from fastattn.kernels.launch import device_of, launch
from fastattn.kernels.recurrent_checks import GATES, check_backward, check_call, check_forward
from fastattn.kernels.recurrent_sequence import (
    recurrent_sequence_backward_kernel,
    recurrent_sequence_kernel,
)
from fastattn.kernels.recurrent_steps import (
    hidden_gradient_kernel,
    project_kernel,
    recurrent_step_backward_kernel,
    recurrent_step_kernel,
)
from fastattn.kernels.rows import on_cpu

LSTM, GRU, RNN_TANH, RNN_RELU = range(4)

# Bytes of W_hh that a program may hold: of 163 KB of shared memory (sm_80; 227 on sm_90 and 100),
# 99 (sm_86, 89, 120), the largest power of two that leaves 24 KB to the rest. On gfx942 they lie in
# registers: a GRU's 24 KB fit, an LSTM's 32 KB spilled.
_WEIGHTS = {
    "sm80": 128 << 10, "sm86": 64 << 10, "sm90": 128 << 10, "sm100": 128 << 10, "sm120": 64 << 10,
    "gfx9": 24 << 10, "cpu": 64 << 10,
}  # fmt: skip
# Warps of the sequence tier's fp32 kernels, by family, gates, units and whether backward, where the
# rule's spill: two to four instructions of ptxas, 50 on gfx942, of whose 16 warps a lane has 128
# registers.
_FP32_WARPS = {
    ("sm80", 1, 64, False): 4, ("sm86", 3, 64, True): 8, ("sm90", 4, 32, True): 4,
    ("sm120", 1, 64, True): 8, ("gfx9", 1, 64, True): 8,
}  # fmt: skip


class Call(NamedTuple):
    """What forward and backward are both given."""

    w_hh: Sequence[Tensor]
    w_hr: Sequence[Tensor]
    h0: Tensor
    c0: Tensor | None
    h_mask: Tensor | None
    offsets: Tensor | None
    lengths: Tensor | None
    T: int
    cell: int
    reverse: int
    H: int
    N: int

    @property
    def empty(self) -> bool:
        return self.T == 0 or self.h0.shape[1] == 0

    @property
    def gates(self) -> int:
        return GATES[self.cell]

    @property
    def ragged(self) -> bool:
        """A step may lack sequences, which then keep their state."""
        return self.offsets is not None or self.lengths is not None

    @property
    def rows_may_lack(self) -> bool:
        """Rows that no step writes: what is returned for them is 0."""
        return self.lengths is not None

    def which(self, step: int) -> tuple[int, ...]:
        """step, T, reverse, B, N of a kernel."""
        return step, self.T, self.reverse, self.h0.shape[1], self.N

    def rows(self, *shape: int) -> Tensor:
        return self.h0.new_zeros(shape) if self.rows_may_lack else self.h0.new_empty(shape)

    def states(self, features: int) -> list[Tensor]:
        """Two fp32 buffers, which steps take in turn."""
        shape = (2, *self.h0.shape[:2], features)
        return list(self.h0.new_empty(shape, dtype=torch.float32))


class Tile(NamedTuple):
    """Sequences, units and depth of a product's tile; warps, stages of the pipeline."""

    BLOCK_B: int
    BLOCK_U: int
    BLOCK_K: int
    num_warps: int
    num_stages: int


def pair(tensors: Sequence[Tensor]) -> tuple[Tensor | None, Tensor | None]:
    """A weight of each direction, as kernels take them."""
    return (*tensors, None, None)[:2]  # type: ignore[return-value]


# ---- tiers -------------------------------------------------------------------------------------


def whole_sequence(cell: int, H: int, projected: bool, dtype: torch.dtype, family: str) -> bool:
    """Whether one program can hold W_hh of a direction: G W W items in shared memory, W the power
    of two from H on, beside what a step's operands take (at most 24 KB, tests/rungs/budgets.json).

    It then makes a step in about 1 to 2 us (an estimate: 128 KB of weights from shared memory at
    128 bytes a clock are 1024 clocks, as many as an A100's tensor cores need for 16 x 128 x 512,
    and the gates as long again), where a step of its own is a launch. It uses D B / 16 SMs,
    though; with B in the thousands that is all of them. fp32 products have their operands in
    registers: of 128 units ptxas spills (an RNN's forward on sm_80: 717 instructions with 16 warps,
    more with fewer)."""
    if dtype == torch.float32 and _width(H) > 64:
        return False
    return not projected and GATES[cell] * _width(H) ** 2 * dtype.itemsize <= _WEIGHTS[family]


def tier(cell: int, H: int, projected: bool, like: Tensor) -> str:
    family = configs.family_of(like.device)
    return "sequence" if whole_sequence(cell, H, projected, like.dtype, family) else "steps"


def sequences_of(B: int) -> int:
    """The most sequences with the same tiles as B; 64: or any number."""
    return 16 if B <= 16 else 32 if B <= 32 else 64


def _width(H: int) -> int:
    return max(16, triton.next_power_of_2(H))


def sequence_tile(cell: int, H: int, dtype: torch.dtype, family: str, backward: bool) -> Tile:
    """Warps share the units: 16 a warp forward, up to 8 warps; 8 in fp32, whose operands of a
    product live in registers, and half as many backward, up to 16 warps: with twice as many a warp
    ptxas spilled two registers of a GRU on sm_89 and sm_90, and of an fp32 LSTM on sm_86."""
    width = _width(H)
    if family == "cpu":
        return Tile(16, width, 0, 1, 1)
    fp32 = dtype == torch.float32
    warps = max(4, width // (16 // (1 + backward) // (1 + fp32)))
    warps = min(16 if backward else 8, warps)
    if fp32:
        warps = _FP32_WARPS.get((family, GATES[cell], width, backward), warps)
    return Tile(16, width, 0, warps, 1)


def step_tile(B: int, depth: int, dtype: torch.dtype, cpu: bool, backward: bool) -> Tile:
    """Few units a program, so that H / 16 programs share the weights: at H = 1024 that is 64 of an
    H100's 132 SMs, and 8 KB of an LSTM's weights a stage on each. Backward a unit has one column
    of W_hh and 4 H of depth, so tiles are deeper. fp32 operands of a product live in registers."""
    if cpu:
        return Tile(16, 16, 16, 1, 1)
    block_b = sequences_of(B)
    if dtype == torch.float32:
        return Tile(min(block_b, 32), 16, 32, 4, 2)
    block_k = 128 if backward else 64
    block_k = max(16, min(block_k, triton.next_power_of_2(depth)))
    return Tile(block_b, 16, block_k, 2 if block_b == 16 else 4, 4 if block_b < 64 else 3)


# ---- forward -----------------------------------------------------------------------------------


def recurrent_forward(
    gx: Tensor, w_hh: Sequence[Tensor], b_hn: Sequence[Tensor], w_hr: Sequence[Tensor], h0: Tensor,
    c0: Tensor | None, h_mask: Tensor | None, offsets: Tensor | None, lengths: Tensor | None,
    T: int, cell: int, reverse: int, save: bool,
) -> tuple[Tensor, ...]:  # fmt: skip
    """All steps of a layer, arguments as in :func:`fastattn.reference.recurrent.recurrence`.

    Returns:
        y (N, D P), h_n (D, B, P), c_n (D, B, H; LSTM's), and where ``save``: gates (D, N, 4 H)
        after their nonlinearity (LSTM i f g o; GRU r z n and W_hn h + b_hn), cells (D, N, H;
        LSTM's c). What there is not is empty, (0,).
    """
    N = gx.shape[1] if gx.dim() == 3 else -1
    H = check_call(h0, w_hh, b_hn, w_hr, c0, h_mask, offsets, lengths, T, cell, reverse, N)
    check_forward(gx, h0, cell, H)
    call = Call(w_hh, w_hr, h0, c0, h_mask, offsets, lengths, T, cell, reverse, H, N)
    D, P = h0.shape[0], h0.shape[2]
    y = call.rows(N, D * P)
    gates = h0.new_empty((D, N, 4 * H) if save and cell <= GRU else (0,))
    cells = h0.new_empty((D, N, H) if save and cell == LSTM else (0,))
    saved = gates if gates.dim() == 3 else None, cells if cells.dim() == 3 else None
    if call.empty:
        return y, h0.clone(), h0.new_empty((0,)) if c0 is None else c0.clone(), gates, cells
    with device_of(h0):
        if tier(cell, H, bool(w_hr), h0) == "sequence":
            return y, *_forward_sequence(call, gx, b_hn, y, *saved), gates, cells
        h_n, c_n = _forward_steps(call, gx, b_hn, y, *saved)
    c_n = h0.new_empty((0,)) if c_n is None else c_n.to(h0.dtype)
    return y, h_n.to(h0.dtype), c_n, gates, cells


def _forward_sequence(
    call: Call, gx: Tensor, b_hn: Sequence[Tensor], y: Tensor, gates: Tensor | None,
    cells: Tensor | None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    h0, c0, D, B = call.h0, call.c0, *call.h0.shape[:2]
    h_n, c_n = torch.empty_like(h0), h0.new_empty((0,)) if c0 is None else torch.empty_like(c0)
    family = configs.family_of(h0.device)
    tile = sequence_tile(call.cell, call.H, h0.dtype, family, backward=False)
    launch(
        recurrent_sequence_kernel, (D * triton.cdiv(B, tile.BLOCK_B),), gx, *pair(call.w_hh),
        *pair(b_hn), h0, c0, call.h_mask, call.offsets, call.lengths, y, h_n,
        None if c0 is None else c_n, gates, cells, *call.which(0)[1:], call.cell, call.H, D,
        call.ragged, *tile[:2], num_warps=tile.num_warps, num_stages=tile.num_stages,
    )  # fmt: skip
    return h_n, c_n


def _forward_steps(
    call: Call, gx: Tensor, b_hn: Sequence[Tensor], y: Tensor, gates: Tensor | None,
    cells: Tensor | None,
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    h0, H = call.h0, call.H
    D, B, P = h0.shape
    hs = call.states(P)
    xs = list(h0.new_empty((2, D, B, P)))
    cs = [None, None] if call.c0 is None else call.states(H)
    m = h0.new_empty((D, B, H)) if call.w_hr else None
    h, c = h0.float(), None if call.c0 is None else call.c0.float()
    x = h0 if call.h_mask is None else (h * call.h_mask).to(h0.dtype)
    where = call.h_mask, call.offsets, call.lengths
    tile, grid = _over(call, H, P, backward=False)
    project, project_grid = _over(call, P, H, backward=False)
    for step in range(call.T):
        after = xs[step % 2], hs[step % 2], cs[step % 2]
        launch(
            recurrent_step_kernel, grid, gx, *pair(call.w_hh), *pair(b_hn), *where, x, h, c, y,
            *after, m, gates, cells, *call.which(step), P, call.cell, H, P, D, call.ragged,
            *tile[:3], num_warps=tile.num_warps, num_stages=tile.num_stages,
        )  # fmt: skip
        if m is not None:
            launch(
                project_kernel, project_grid, m, *pair(call.w_hr), *where, h, y, *after[:2],
                *call.which(step), H, H, P, D, call.ragged, *project[:3],
                num_warps=project.num_warps, num_stages=project.num_stages,
            )  # fmt: skip
        x, h, c = after
    return h, c


def _over(call: Call, units: int, depth: int, backward: bool) -> tuple[Tile, tuple[int]]:
    """The tile and grid of a step's kernel whose programs share ``units``."""
    D, B = call.h0.shape[:2]
    tile = step_tile(B, depth, call.h0.dtype, on_cpu(call.h0), backward)
    return tile, (D * triton.cdiv(B, tile.BLOCK_B) * triton.cdiv(units, tile.BLOCK_U),)


# ---- backward ----------------------------------------------------------------------------------


def recurrent_backward(
    dy: Tensor | None, dh_n: Tensor | None, dc_n: Tensor | None, y: Tensor, gates: Tensor,
    cells: Tensor, w_hh: Sequence[Tensor], w_hr: Sequence[Tensor], h0: Tensor, c0: Tensor | None,
    h_mask: Tensor | None, offsets: Tensor | None, lengths: Tensor | None, T: int, cell: int,
    reverse: int,
) -> tuple[Tensor, ...]:  # fmt: skip
    """The gradients that the recurrence itself makes; those of weights are GEMMs over all rows.

    Args:
        dy: (N, D P). dh_n: (D, B, P). dc_n: (D, B, H). None = zeros. y, gates, cells: the
            forward's. The rest as in :func:`recurrent_forward`.

    Returns:
        dgx (D, N, G H); dghn (D, N, H; GRU's: of W_hn h + b_hn); dh0 (D, B, P); dc0 (D, B, H;
        LSTM's); dh (D, N, P; with a projection: of h, whole). What there is not is empty, (0,);
        rows of steps that a sequence does not have are 0.
    """
    N = y.shape[0]
    H = check_call(h0, w_hh, (), w_hr, c0, h_mask, offsets, lengths, T, cell, reverse, N)
    check_backward(dy, dh_n, dc_n, y, gates, cells, h0, cell, H)
    call = Call(w_hh, w_hr, h0, c0, h_mask, offsets, lengths, T, cell, reverse, H, N)
    D, _, P = h0.shape
    dgx = call.rows(D, N, call.gates * H)
    dghn = call.rows(D, N, H) if cell == GRU else None
    dm = call.rows(D, N, P) if w_hr else None
    dh = torch.zeros_like(h0) if dh_n is None else dh_n
    dc = None if c0 is None else torch.zeros_like(c0) if dc_n is None else dc_n
    if not call.empty:
        with device_of(h0):
            if tier(cell, H, bool(w_hr), h0) == "sequence":
                dh, dc = _backward_sequence(call, dy, dh_n, dc_n, y, gates, cells, dgx, dghn)
            else:
                dh, dc = _backward_steps(call, dy, dh, dc, y, gates, cells, dgx, dghn, dm)
    nothing = h0.new_empty((0,))
    return (
        dgx,
        nothing if dghn is None else dghn,
        dh.to(h0.dtype, copy=dh is dh_n),
        nothing.clone() if dc is None else dc.to(h0.dtype, copy=dc is dc_n),
        nothing.clone() if dm is None else dm,
    )


def _backward_sequence(
    call: Call, dy: Tensor | None, dh_n: Tensor | None, dc_n: Tensor | None, y: Tensor,
    gates: Tensor, cells: Tensor, dgx: Tensor, dghn: Tensor | None,
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    h0, c0, D, B = call.h0, call.c0, *call.h0.shape[:2]
    dh0, dc0 = torch.empty_like(h0), None if c0 is None else torch.empty_like(c0)
    family = configs.family_of(h0.device)
    tile = sequence_tile(call.cell, call.H, h0.dtype, family, backward=True)
    launch(
        recurrent_sequence_backward_kernel, (D * triton.cdiv(B, tile.BLOCK_B),), dy, dh_n, dc_n, y,
        gates, cells, *pair(call.w_hh), h0, c0, call.h_mask, call.offsets, call.lengths, dgx, dghn,
        dh0, dc0, *call.which(0)[1:], call.cell, call.H, D, *tile[:2],
        num_warps=tile.num_warps, num_stages=tile.num_stages,
    )  # fmt: skip
    return dh0, dc0


def _backward_steps(
    call: Call, dy: Tensor | None, dh: Tensor, dc: Tensor | None, y: Tensor, gates: Tensor,
    cells: Tensor, dgx: Tensor, dghn: Tensor | None, dm: Tensor | None,
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    D, _, P = call.h0.shape
    H, w_hh = call.H, pair(call.w_hh)
    dh, dc = dh.float(), None if dc is None else dc.float()
    dhs = call.states(P)
    dcs = [None, None] if dc is None else call.states(H)
    where = call.h_mask, call.offsets, call.lengths
    depth = call.gates * H
    tile, grid = _over(call, H, P if dm is not None else depth, backward=True)
    of_h, of_h_grid = _over(call, P, depth, backward=True)
    w_step = w_hh if dm is None else pair(call.w_hr)

    def make_dh(step: int, dh: Tensor, dh_next: Tensor) -> None:
        launch(
            hidden_gradient_kernel, of_h_grid, dy, *w_hh, *where, dh, dgx, dghn, dm, dh_next,
            *call.which(step), H, call.cell, H, P, D, *of_h[:3], num_warps=of_h.num_warps,
            num_stages=of_h.num_stages,
        )  # fmt: skip

    for step in reversed(range(call.T)):
        dh_next, dc_next = dhs[step % 2], dcs[step % 2]
        if dm is not None:
            make_dh(step, dh, dh_next)
        launch(
            recurrent_step_backward_kernel, grid, None if dm is not None else dy, dm, y, gates,
            cells, *w_step, call.h0, call.c0, *where, dh, dc, dgx, dghn, dh_next, dc_next,
            *call.which(step), H, P, call.cell, H, P, D, call.ragged, *tile[:3],
            num_warps=tile.num_warps, num_stages=tile.num_stages,
        )  # fmt: skip
        dh, dc = dh_next, dc_next
    dh0 = dhs[1]  # step 0 left its own in the other
    make_dh(-1, dh, dh0)
    return dh0, dc
