"""LSTM, GRU and RNN below their functions: opcheck, every instruction set, threads, what is saved,
and direct calls of the CPU's ops with arguments that do not fit."""

import ctypes
import re
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from recurrent_layers import Call, judge, make
from test_attention_ops import op_calls_of
from tools import DTYPES
from torch import Tensor, nn

import fastattn
from fastattn.backends import cpu_isas, force_cpu_isa
from fastattn.reference.recurrent import GATES, GRU, LSTM, RNN_TANH

LENGTHS = [2, 5, 0, 1]

# ------------------------------------------------------------------------- as torch sees them

OP_CALLS: dict[str, Callable[[], Call]] = {
    "lstm": lambda: make("lstm", D=2),
    "lstm_projected": lambda: make("lstm", proj=3, B=4, lengths=LENGTHS),
    "lstm_no_bias": lambda: make("lstm", bias=False, packed=(5, 2, 4)),
    "gru": lambda: make("gru", D=2, B=4, lengths=LENGTHS, recurrent_dropout_p=0.3, seed=1),
    "gru_one_step": lambda: make("gru", T=1),
    "rnn": lambda: make("rnn_tanh", D=2, packed=(5, 2, 4)),
}


@pytest.mark.parametrize("name", OP_CALLS)
def test_opcheck(name: str) -> None:
    call = OP_CALLS[name]()
    calls = op_calls_of(lambda: call.results(fastattn, backend="cpu"))
    calls = {op: c for op, c in calls.items() if op.startswith("recurrent_layer")}
    assert calls.keys() == {"recurrent_layer_fwd", "recurrent_layer_bwd"}
    for op, (func, args) in calls.items():
        given = tuple(
            a.detach().requires_grad_(op.endswith("fwd"))
            if isinstance(a, Tensor) and a.is_floating_point()
            else a
            for a in args
        )
        result = torch.library.opcheck(func, given)
        assert set(result.values()) == {"SUCCESS"}


# ----------------------------------------------------------------------- every instruction set

# Tails of 4, 8 and 16 lanes; more rows than a tile; pieces of K; blocks of rows.
SHAPES: dict[str, dict[str, Any]] = {
    "tails": {"H": 17, "D": 2, "recurrent_dropout_p": 0.3, "seed": 5},
    "lengths": {"H": 33, "B": 4, "D": 2, "lengths": LENGTHS},
    "packed": {"H": 20, "B": 7, "D": 2, "packed": (5, 5, 4, 2, 2, 1, 1)},
    "pieces": {"T": 3, "H": 130, "B": 14},
    "blocks": {"T": 2, "H": 9, "B": 103},
    "one_step": {"T": 1, "H": 40},
}
ISAS = cpu_isas()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("cell", ["lstm", "gru", "rnn_tanh"])
@pytest.mark.parametrize("isa", ISAS)
def test_instruction_sets(isa: str, cell: str, shape: str, dtype: torch.dtype) -> None:
    with force_cpu_isa(isa):
        judge(make(cell, dtype=dtype, **SHAPES[shape]), "cpu")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("proj", [1, 20, 100])
@pytest.mark.parametrize("isa", ISAS)
def test_projection_by_instruction_set(isa: str, proj: int, dtype: torch.dtype) -> None:
    with force_cpu_isa(isa):
        judge(make("lstm", H=117, proj=proj, B=14, T=3, dtype=dtype), "cpu")


@pytest.mark.parametrize("isa", ISAS)
def test_relu_by_instruction_set(isa: str) -> None:
    with force_cpu_isa(isa):  # in 16 bits rounding moves values across the kink
        judge(make("rnn_relu", **SHAPES["lengths"]), "cpu")


@pytest.mark.parametrize("cell", ["lstm", "gru", "rnn_tanh"])
@pytest.mark.parametrize("isa", ISAS)
def test_one_feature(isa: str, cell: str) -> None:
    with force_cpu_isa(isa):  # in 16 bits a gradient of one number is luck
        judge(make(cell, H=1, B=9), "cpu")


# ------------------------------------------------------------------------------- the recurrence


@dataclass(frozen=True)
class Recurrence:
    """One direct call of recurrence_cpu_fwd, then recurrence_cpu_bwd of its results: what they
    give has no GEMM of torch in it, whose bits are torch's."""

    gx: Any
    w_hh: Any
    h0: Any
    gh: Any = None
    w_hh_reverse: Any = None
    biases: tuple[Any, ...] = (None,) * 4  # b_ih, its reverse, b_hh, its reverse
    w_hr: tuple[Any, Any] = (None, None)
    c0: Any = None
    h_mask: Any = None
    offsets: Any = None
    lengths: Any = None
    T: int = 0
    cell: int = LSTM
    reverse: int = 0

    @property
    def _steps(self) -> tuple[Any, ...]:
        return (self.h0, self.c0, self.h_mask, self.offsets, self.lengths, self.T, self.cell,
                self.reverse)  # fmt: skip

    def forward(self, save: bool = True) -> tuple[Tensor, ...]:
        gx = self.gx.clone() if self.gx.is_contiguous() else self.gx  # LSTM's gates take its place
        out = torch.ops.fastattn.recurrence_cpu_fwd(
            gx, self.gh, self.w_hh, self.w_hh_reverse, *self.biases, *self.w_hr, *self._steps, save
        )
        return (*out[:3], gx if save and self.cell == LSTM else out[3], out[4])

    def backward(self, saved: tuple[Tensor, ...], **other: Any) -> tuple[Tensor, ...]:
        y, h_n, c_n, gates, cells = saved
        gen = torch.Generator().manual_seed(3)
        dy, dh_n, dc_n = (torch.randn(x.shape, generator=gen).to(x.dtype) for x in (y, h_n, c_n))
        named = {"dy": dy, "dh_n": dh_n, "dc_n": dc_n if self.cell == LSTM else None, "y": y}
        named |= {"gates": gates, "cells": cells} | other
        return torch.ops.fastattn.recurrence_cpu_bwd(  # type: ignore[no-any-return]
            *named.values(), self.gh, self.w_hh, self.w_hh_reverse, *self.w_hr, *self._steps
        )

    def all(self) -> tuple[Tensor, ...]:
        out = self.forward()
        return (*out[:3], *self.backward(out))


def recurrence(
    cell: int = LSTM, *, T: int = 3, B: int = 2, H: int = 5, P: int = 0, D: int = 1,
    dtype: torch.dtype = torch.float32, **more: Any,
) -> Recurrence:  # fmt: skip
    G, p = GATES[cell], P or H
    gen = torch.Generator().manual_seed(11)

    def randn(*shape: int) -> Tensor:
        return torch.randn(shape, generator=gen).to(dtype)

    pair = [(randn(G * H, p) * p**-0.5).to(dtype) for _ in range(D)]
    given: dict[str, Any] = {
        "gx": randn(D, T * B, G * H), "w_hh": pair[0], "h0": randn(D, B, p), "T": T, "cell": cell,
        "w_hh_reverse": pair[1] if D == 2 else None, "reverse": 2 if D == 2 else 0,
        "c0": randn(D, B, H) if cell == LSTM else None,
    }  # fmt: skip
    if P:
        projections = [(randn(P, H) * H**-0.5).to(dtype) for _ in range(D)]
        given["w_hr"] = (*projections, None)[:2]
    return Recurrence(**{**given, **more})


def same(got: tuple[Tensor, ...], right: tuple[Tensor, ...]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(got, right, strict=True))


# What the plan makes of two threads or three (recurrent_plan.h): slices of the batch where there
# are many sequences, else a team that shares the hidden units, where they are worth its barriers.
PLANS: dict[str, Callable[[torch.dtype], Recurrence]] = {
    "slices": lambda dtype: recurrence(
        T=6,
        B=14,
        H=64,
        dtype=dtype,
        lengths=torch.tensor([6, 1, 4, 2, 6, 6, 0, 3, 6, 6, 5, 6, 6, 2]),
    ),
    "slices_gru": lambda dtype: recurrence(GRU, T=6, B=13, H=70, dtype=dtype),
    "team": lambda dtype: recurrence(T=6, B=3, H=129, dtype=dtype, reverse=1),
    "team_lengths": lambda dtype: recurrence(
        T=8, B=4, H=129, dtype=dtype, lengths=torch.tensor([3, 8, 0, 5])
    ),
    "team_projected": lambda dtype: recurrence(T=6, B=3, H=150, P=130, dtype=dtype),
    "team_gru": lambda dtype: recurrence(GRU, T=6, B=3, H=150, dtype=dtype),
    "team_rnn": lambda dtype: recurrence(RNN_TANH, T=6, B=3, H=260, dtype=dtype),
    "directions": lambda dtype: recurrence(T=6, B=2, H=129, D=2, dtype=dtype),
}


@pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)
@pytest.mark.parametrize("plan", PLANS)
def test_bits_depend_on_no_thread(plan: str, dtype: torch.dtype) -> None:
    call = PLANS[plan](dtype)
    torch.set_num_threads(1)
    right = call.all()
    for threads in (1, 2, 3, 4, 2, 3):
        torch.set_num_threads(threads)
        assert same(call.all(), right), threads


def libgomp() -> ctypes.CDLL:
    """The OpenMP of torch's own threads."""
    found = re.findall(r"/\S*libgomp\S*", Path("/proc/self/maps").read_text())
    assert found, "torch's threads are not OpenMP's"
    return ctypes.CDLL(found[0])


@pytest.mark.parametrize("plan", PLANS)
def test_inside_another_parallel_region(plan: str) -> None:
    """There a Parallel's workers run one after the other: a team that waited for all of its members
    would wait for ever."""
    call = PLANS[plan](torch.float32)
    torch.set_num_threads(2)
    right, found = call.all(), []

    @ctypes.CFUNCTYPE(None, ctypes.c_void_p)
    def body(_: Any) -> None:
        found.append(call.all())

    libgomp().GOMP_parallel(body, None, 2, 0)
    assert len(found) == 2
    assert all(same(got, right) for got in found)


def test_concurrent_callers() -> None:
    """Two Python threads, with teams and slices of their own at the same time."""
    torch.set_num_threads(2)
    calls = [PLANS[p](torch.float32) for p in ("team", "slices", "team_projected", "team_gru")]
    right = [call.all() for call in calls]
    with ThreadPoolExecutor(2) as pool:
        for _ in range(4):
            for got, want in zip(pool.map(Recurrence.all, calls), right, strict=True):
                assert same(got, want)


# -------------------------------------------------------------------------------- what is saved


@pytest.mark.parametrize("cell", [LSTM, GRU, RNN_TANH])
def test_nothing_is_saved_without_a_gradient(cell: int) -> None:
    call = recurrence(cell)
    lean, full = call.forward(save=False), call.forward()
    assert same(lean[:3], full[:3])
    assert lean[3].numel() == lean[4].numel() == 0
    if cell != RNN_TANH:
        assert full[3].numel() > 0
        with pytest.raises(RuntimeError, match="gates must be the forward's"):
            call.backward(lean)


def saved_bytes(module: nn.Module, x: Tensor) -> int:
    """Of the storages that autograd keeps, but for the parameters and x."""
    own = {t.untyped_storage().data_ptr() for t in (x, *module.parameters())}
    kept: dict[int, int] = {}

    def pack(t: Tensor) -> Tensor:
        storage = t.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        out = module(x)  # alive until the bytes are counted: nothing takes an address again
    assert out[0].requires_grad
    return sum(kept.values())


@pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize(
    ("name", "options"),
    [("LSTM", {}), ("LSTM", {"bidirectional": True, "num_layers": 2}), ("LSTM", {"proj_size": 24}),
     ("GRU", {}), ("GRU", {"bidirectional": True, "num_layers": 2}), ("RNN", {})],
)  # fmt: skip
def test_no_more_is_saved_than_by_torch(
    name: str, options: dict[str, Any], training: bool, dtype: torch.dtype
) -> None:
    theirs = getattr(nn, name)(32, 48, **options).to(dtype).train(training)
    ours = getattr(fastattn.nn, name)(32, 48, **options).to(dtype).train(training)
    x = torch.randn(20, 6, 32, dtype=dtype, requires_grad=True)
    assert 0 < saved_bytes(ours, x) <= saved_bytes(theirs, x)


# ------------------------------------------------------------------- calls that do not fit

LONG = torch.long
HOSTILE: dict[str, tuple[dict[str, Any], str]] = {
    "gx_dims": ({"gx": torch.randn(6, 20)}, "gx must have shape"),
    "gx_rows": ({"gx": torch.randn(1, 5, 20)}, "gx must have T B rows"),
    "gx_columns": ({"gx": torch.randn(1, 6, 21)}, "G H columns"),
    "gx_dtype": ({"gx": torch.randn(1, 6, 20).double()}, "input must be float32, bfloat16 or"),
    "gx_strides": ({"gx": torch.randn(1, 20, 6).mT}, "gx must be contiguous"),
    "gx_expanded": ({"gx": torch.randn(1, 1, 20).expand(1, 6, 20)}, "gx must be contiguous"),
    "no_hidden_features": (
        {"gx": torch.zeros(1, 6, 0), "h0": torch.zeros(1, 2, 0), "c0": torch.zeros(1, 2, 0),
         "w_hh": torch.zeros(0, 0)}, "h0 must have features|G H columns",
    ),
    "no_projected_features": (
        {"h0": torch.zeros(1, 2, 0), "w_hh": torch.zeros(20, 0), "w_hr": (torch.zeros(0, 5), None)},
        "h0 must have features",
    ),
    "no_direction": (
        {"gx": torch.zeros(0, 6, 20), "h0": torch.zeros(0, 2, 5), "c0": torch.zeros(0, 2, 5)},
        "D 1 or 2",
    ),
    "three_directions": (
        {"gx": torch.zeros(3, 6, 20), "h0": torch.zeros(3, 2, 5), "c0": torch.zeros(3, 2, 5)},
        "D 1 or 2",
    ),
    "T": ({"T": 4}, "gx must have T B rows"),
    "T_negative": ({"T": -3}, "T must be from 0"),
    "T_times_B_wraps": (
        {"T": 2**62 + 1, "gx": torch.randn(1, 2, 20), "h0": torch.randn(1, 4, 5),
         "c0": torch.randn(1, 4, 5)}, "gx must have T B rows",
    ),
    "T_largest": (
        {"T": 2**63 - 1, "offsets": torch.tensor([0])}, "T must be from 0",
    ),
    "cell": ({"cell": 4}, "cell must be 0 to 3"),
    "cell_negative": ({"cell": -1}, "cell must be 0 to 3"),
    "reverse": ({"reverse": 2}, "reverse must have a bit a direction"),
    "reverse_negative": ({"reverse": -1}, "reverse must have a bit a direction"),
    "h0_shape": ({"h0": torch.randn(1, 2, 4)}, "h0 must have H features"),
    "h0_batch": ({"h0": torch.randn(1, 3, 5)}, "c0 must have shape"),
    "h0_dtype": ({"h0": torch.randn(1, 2, 5).half()}, "one dtype"),
    "c0_none": ({"c0": None}, "c0 must be given"),
    "c0_shape": ({"c0": torch.randn(1, 5, 2)}, "c0 must have shape"),
    "w_hh_shape": ({"w_hh": torch.randn(5, 20)}, "w_hh must have shape"),
    "w_hh_none": ({"w_hh": None}, "w_hh must be given"),
    "w_hh_dtype": ({"w_hh": torch.randn(20, 5).bfloat16()}, "one dtype"),
    "w_hh_int": ({"w_hh": torch.ones(20, 5, dtype=LONG)}, "must be float32, bfloat16 or"),
    "w_hr_shape": ({"w_hr": (torch.randn(5, 4), None)}, "w_hr must have shape|gates must be"),
    "h_mask_shape": ({"h_mask": torch.ones(1, 2, 1)}, "h_mask must have h0's shape"),
    "lengths_shape": ({"lengths": torch.tensor([3])}, "lengths must have shape"),
    "lengths_dtype": ({"lengths": torch.tensor([3.0, 1.0])}, "lengths must have shape"),
    "lengths_beyond": ({"lengths": torch.tensor([3, 4])}, r"lengths must be in \[0, 3\], got 4"),
    "lengths_negative": ({"lengths": torch.tensor([-1, 3])}, r"lengths must be in \[0, 3\]"),
    "offsets_shape": ({"offsets": torch.tensor([0, 2, 6])}, "offsets must have shape"),
    "offsets_first": ({"offsets": torch.tensor([1, 2, 4, 6])}, "offsets must run from 0"),
    "offsets_last": ({"offsets": torch.tensor([0, 2, 4, 5])}, "offsets must run from 0"),
    "offsets_rise": ({"offsets": torch.tensor([0, 1, 3, 6])}, "offsets must rise by steps"),
    "offsets_fall": ({"offsets": torch.tensor([0, 2, -2, 6])}, "offsets must rise by steps"),
    "offsets_beyond_B": ({"offsets": torch.tensor([0, 3, 5, 6])}, "offsets must rise by steps"),
    "offsets_wrap": (
        {"offsets": torch.tensor([0, -(2**63), 2**63 - 1, 6])}, "offsets must rise by steps",
    ),
    "offsets_and_lengths": (
        {"offsets": torch.tensor([0, 2, 4, 6]), "lengths": torch.tensor([3, 3])},
        "exclude each other",
    ),
    "gh_of_steps": ({"gh": torch.randn(1, 2, 20)}, "gh is for one step"),
}  # fmt: skip
# Which of them the backward has no argument for.
FORWARD_ALONE = {"gx_dims", "gx_columns", "gx_dtype", "gx_strides", "gx_expanded"}


@pytest.mark.parametrize("name", HOSTILE)
def test_forward_refuses(name: str) -> None:
    change, message = HOSTILE[name]
    with pytest.raises(RuntimeError, match=message):
        replace(recurrence(), **change).forward()


@pytest.mark.parametrize("name", sorted(HOSTILE.keys() - FORWARD_ALONE))
def test_backward_refuses(name: str) -> None:
    change, _ = HOSTILE[name]
    call = recurrence()
    saved = call.forward()
    wrong = replace(call, **change)
    rows = wrong.gx.shape[1]
    if rows != 6:  # the backward has y's
        saved = (torch.zeros(rows, 5), *saved[1:])
    with pytest.raises(RuntimeError, match=r"fastattn::recurrence: "):
        wrong.backward(saved)


@pytest.mark.parametrize(
    ("name", "wrong"),
    [("y", (6, 4)), ("y", (4, 5)), ("y", (6,)), ("gates", (1, 6, 19)), ("gates", (0,)),
     ("cells", (1, 5, 5)), ("cells", (0,)), ("dy", (5, 5)), ("dy", (6, 1)), ("dh_n", (2, 5)),
     ("dc_n", (1, 2, 4))],
)  # fmt: skip
def test_backward_refuses_what_is_not_the_forwards(name: str, wrong: tuple[int, ...]) -> None:
    call = recurrence()
    saved = call.forward()
    with pytest.raises(RuntimeError, match=r"fastattn::recurrence: "):
        call.backward(saved, **{name: torch.zeros(wrong)})
    with pytest.raises(RuntimeError, match=r"fastattn::recurrence: "):
        call.backward(saved, **{name: dict(zip(("y", "gates", "cells"), (saved[0], *saved[3:]),
                      strict=True)).get(name, torch.zeros(wrong)).double()})  # fmt: skip


def test_gh_of_another_shape() -> None:
    call = recurrence(T=1, B=2)
    with pytest.raises(RuntimeError, match="gh must have shape"):
        replace(call, gh=torch.randn(1, 2, 19)).forward()
    with pytest.raises(RuntimeError, match="w_hh must have shape"):
        replace(call, gh=torch.randn(1, 2, 20), w_hh=torch.randn(20, 1)).forward()


@pytest.mark.parametrize("steps", [1, 3])
def test_layer_refuses_directions_that_differ(steps: int) -> None:
    call = make("lstm", T=steps, D=2)
    _, (func, args) = next(
        c for c in op_calls_of(lambda: call.results(fastattn, backend="cpu")).items()
        if c[0] == "recurrent_layer_fwd"
    )  # fmt: skip
    for i in (6, 7):  # w_ih_reverse, w_hh_reverse
        wrong = list(args)
        wrong[i] = torch.cat((args[i], args[i]))
        with pytest.raises((RuntimeError, ValueError), match="w_ih must have one|w_hh must have"):
            func(*wrong)


def test_strided_operands() -> None:
    """Views of every operand but gx."""
    call = recurrence(GRU, T=4, B=3)
    strided = replace(
        call, w_hh=call.w_hh.t().contiguous().t(), h0=call.h0.mT.contiguous().mT,
        lengths=torch.tensor([4, 9, 2, 9, 1, 9])[::2],
    )  # fmt: skip
    plain = replace(call, lengths=torch.tensor([4, 2, 1]))
    assert same(strided.all(), plain.all())
