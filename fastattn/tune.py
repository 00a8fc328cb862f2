"""``fastattn.tune``: which backend, torch's own among them, is fastest here for a model's calls.

The model runs once, and every call of an op in it that there is a choice for (``TUNED``) is kept
with its arguments, one of each class (``choices.py`` says what a class is). Each is then measured
on every backend that can serve it, in turns, and the choices are stored where ``auto`` finds them.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from types import CodeType, FrameType
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence

from fastattn import choices, measure
from fastattn.backends import can_serve, select, select_layernorm_ffn
from fastattn.ops.attention import attention, attention_varlen
from fastattn.ops.embedding import embedding
from fastattn.ops.encoder_layer import encoder_layer
from fastattn.ops.gru import gru, gru_cell
from fastattn.ops.layernorm import add_layer_norm, bias_act, layer_norm, rms_norm
from fastattn.ops.layernorm_ffn import layernorm_ffn
from fastattn.ops.lstm import lstm, lstm_cell
from fastattn.ops.rnn import rnn, rnn_cell

# attention_with_kv_cache, linear_cross_entropy and a decoder's layer have no op of torch's beside
# them, and on a CPU one backend: auto takes the table's for them.
TUNED: tuple[Callable[..., Any], ...] = (
    attention, attention_varlen, embedding, encoder_layer, layer_norm, rms_norm, add_layer_norm,
    bias_act, layernorm_ffn, lstm, lstm_cell, gru, gru_cell, rnn, rnn_cell,
)  # fmt: skip
_BY_CODE: dict[CodeType, Callable[..., Any]] = {op.__code__: op for op in TUNED}

# The table's backend stays unless another is faster by this much, in three of four rounds at least:
# less than that differs from run to run. And by as many seconds as it takes to look a choice up,
# which costs only ops that have one other than the table's.
GAIN, LOOKUP = 1.03, 10e-6

Progress = Callable[[int, int, str], None]


@dataclass(frozen=True)
class Tuned:
    """One class of calls: what was measured, what was chosen.

    Attributes:
        name: the class, as ``choices.name_of`` writes it.
        seconds: median a call (forward, in training the gradients too) by backend.
        usual: what the table in ``backends.py`` takes. chosen: what ``auto`` takes from now on.
        gain: times that chosen is faster than usual: median of the ratios of neighbouring rounds.
    """

    name: str
    seconds: dict[str, float]
    usual: str
    chosen: str
    gain: float


@dataclass
class TuneReport:
    """What :func:`tune` found. ``path``: the file it is stored in, None if it is not."""

    rows: list[Tuned] = field(default_factory=list)
    path: Path | None = None

    def __str__(self) -> str:
        lines = [f"fastattn.tune: {len(self.rows)} classes of calls"]
        for row in self.rows:
            times = ", ".join(f"{b} {s * 1e6:.1f} us" for b, s in row.seconds.items())
            lines.append(f"  {row.name}: {row.chosen} ({times})")
        if self.path:
            lines.append(f"stored in {self.path}")
        return "\n".join(lines)


def tune(
    model: torch.nn.Module | Callable[..., Any],
    example_inputs: Any = (),
    *,
    training: bool | None = None,
    seconds: float = 1.0,
    store: bool = True,
    progress: Progress | None = None,
) -> TuneReport:
    """Measure the backends for the calls of a model, and let ``auto`` take the fastest from now on.

    Torch's own ops are one of the backends, where they compute the same (gradients, double backward
    and rows without keys included; no dropout, biases, windows or lengths). So what ``auto`` takes
    is not slower than torch for calls of these classes, beyond what measuring can tell.

    Tuned are attention, attention_varlen, embedding, norms, bias_act, layernorm_ffn, whole encoder
    layers, lstm, gru, rnn and their cells. Not attention_with_kv_cache, linear_cross_entropy nor
    whole decoder layers, so of generation with a KV cache the first pass at most.

    A class is op, device, dtype, training or not, features and widths as they are, and batch,
    lengths and rows rounded up to a power of two. Choices hold for this hardware, thread count and
    versions; they lie in ``FASTATTN_TUNE_CACHE``, by default in ``fastattn`` in the user's cache
    folder, and every process reads them at its first ``auto``. Calls that name a backend, and
    graphs of ``torch.compile``, take no notice of them.

    Args:
        model: a swapped model, one built of ``fastattn.nn``, or any function that calls the ops.
        example_inputs: what to call it with: a tensor, a tuple of positional arguments, a dict of
            keyword arguments, or a list of such for more than one shape.
        training: measure with the gradients; default: whether the model is in training mode. The
            forward runs as it is (dropout, running statistics); nothing is backpropagated into it.
        seconds: most for one class.
        store: False: only report.
        progress: called as (done, of, class) before each class.

    Returns:
        A :class:`TuneReport`.

    Raises:
        TypeError: the model cannot be called; ``seconds`` is no number.
        ValueError: the model called no op that is tuned with ``backend="auto"``; ``seconds`` is not
            positive.
        OSError: the choices cannot be stored; that is tried before anything is measured.

    >>> import torch, fastattn
    >>> layer = fastattn.nn.LayerNorm(64).eval()
    >>> report = fastattn.tune(layer, torch.randn(4, 64), seconds=0.05, store=False)
    >>> report.rows[0].name, sorted(report.rows[0].seconds)
    ('layer_norm cpu float32 inference 4 64 ++', ['cpu', 'torch'])
    """
    if not callable(model):
        raise TypeError(f"fastattn.tune: model must be callable, got {type(model).__name__}")
    if isinstance(seconds, bool) or not isinstance(seconds, (int, float)):
        raise TypeError(f"fastattn.tune: seconds must be a number, got {type(seconds).__name__}")
    if not 0.0 < seconds < math.inf:
        raise ValueError(f"fastattn.tune: seconds must be positive and finite, got {seconds}")
    if training is None:
        training = bool(getattr(model, "training", False))
    examples = example_inputs if isinstance(example_inputs, list) else [example_inputs]
    found: dict[str, _Kept] = {}
    for example in examples:
        found |= {name: kept for name, kept in _listen(model, example, training).items()
                  if name not in found}  # fmt: skip
    if not found:
        raise ValueError(
            "fastattn.tune: the model called none of the ops that are tuned with backend='auto'; "
            f"they are {', '.join(op.__name__ for op in TUNED)}. If it was not, "
            "fastattn.swap(model) first"
        )
    if store:
        choices.ready()
    report = TuneReport()
    for i, (name, kept) in enumerate(found.items()):
        if progress is not None:
            progress(i, len(found), name)
        report.rows.append(_measure(name, kept, seconds))
    if store:
        report.path = choices.store(
            {
                row.name: {"backend": row.chosen, "usual": row.usual, "seconds": row.seconds}
                for row in report.rows
            }
        )
    return report


@dataclass(frozen=True)
class _Kept:
    """A call: the op's name (a cell's is its own), the function, its arguments by name."""

    op: str
    call: choices.Call
    function: Callable[..., Any]
    arguments: dict[str, Any]


def _listen(model: Callable[..., Any], example: Any, training: bool) -> dict[str, _Kept]:
    """The calls of a run, one of each class.

    Arguments are read by a profiling hook at the entry of the functions: wrapping them instead
    would cost every call of everybody, and they are imported by name all over the package.
    """
    found: dict[str, _Kept] = {}
    inside: list[tuple[Callable[..., Any], dict[str, Any]]] = []

    def hook(frame: FrameType, event: str, _: Any) -> None:
        function = _BY_CODE.get(frame.f_code)
        if function is None:
            return
        if event == "call":
            inside.append((function, dict(frame.f_locals)))
        elif event == "return":
            inside.pop()

    def observe(op: str, call: choices.Call) -> None:
        name = choices.name_of(op, call)
        if inside and name not in found:
            function, arguments = inside[-1]
            found[name] = _Kept(op, call, function, _fresh(arguments, {}))

    args, kwargs = _arguments(example)
    former, choices.observer = sys.getprofile(), observe
    sys.setprofile(hook)
    try:
        with nullcontext() if training else torch.no_grad():
            model(*args, **kwargs)
    finally:
        sys.setprofile(former)
        choices.observer = None
    return found


def _arguments(example: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    if isinstance(example, tuple):
        return example, {}
    if isinstance(example, dict) or hasattr(example, "keys"):  # a tokenizer's BatchEncoding too
        return (), {name: example[name] for name in example.keys()}  # noqa: SIM118
    return (example,), {}


def _fresh(x: Any, seen: dict[int, Any]) -> Any:
    """Arguments without their history: leaves of their own, shared where they were."""
    if isinstance(x, Tensor):
        if id(x) not in seen:
            seen[id(x)] = x.detach().requires_grad_(x.requires_grad)
        return seen[id(x)]
    if isinstance(x, PackedSequence):
        return x._replace(data=_fresh(x.data, seen))
    if isinstance(x, dict):
        return {name: _fresh(value, seen) for name, value in x.items()}
    if isinstance(x, tuple) and hasattr(x, "_fields"):
        return type(x)(*(_fresh(value, seen) for value in x))
    if isinstance(x, (tuple, list)):
        return type(x)(_fresh(value, seen) for value in x)
    return x


def _tensors(x: Any) -> list[Tensor]:
    if isinstance(x, Tensor):
        return [x]
    if isinstance(x, dict):
        return [t for value in x.values() for t in _tensors(value)]
    return [t for value in x for t in _tensors(value)] if isinstance(x, (tuple, list)) else []


def _thunk(kept: _Kept, backend: str) -> Callable[[], Any]:
    """One call, in training with its gradients, waited for on a GPU."""
    arguments = {**_fresh(kept.arguments, {}), "backend": backend}
    leaves = list({id(t): t for t in _tensors(arguments) if t.requires_grad}.values())

    def wait() -> None:
        if kept.call.device == "cuda":
            torch.cuda.synchronize()

    def forward() -> None:
        with torch.no_grad():
            kept.function(**arguments)
        wait()

    if not kept.call.training:
        return forward

    def outputs() -> list[Tensor]:
        with torch.enable_grad():
            return [t for t in _tensors(kept.function(**arguments)) if t.requires_grad]

    upstream = [torch.randn_like(t) for t in outputs()]

    def both() -> None:
        torch.autograd.grad(outputs(), leaves, upstream, allow_unused=True)
        wait()

    return both


def _usual(kept: _Kept) -> str:
    """What the table takes."""
    call = kept.call
    if kept.op == "layernorm_ffn":
        return select_layernorm_ffn(
            "auto", call.device, call.dtype, call.sizes[0], call.width, call.training
        )
    return select(kept.op.removesuffix("_cell"), "auto", call.device, call.dtype, call.width)


def _measure(name: str, kept: _Kept, seconds: float) -> Tuned:
    call, op = kept.call, kept.op.removesuffix("_cell")
    usual = _usual(kept)
    names = [usual]
    if op != "encoder_layer":  # a fusion of the CPU backend alone
        names += [
            b for b in ("cuda", "triton", "cpu")
            if b != usual and can_serve(op, b, call.device, call.dtype, call.width)
        ]  # fmt: skip
    if call.plain:
        names.append(choices.STOCK)
    fns = {b: _thunk(kept, b) for b in names}
    samples = measure.interleave(fns, rounds=41, max_seconds=seconds, min_rounds=7)
    medians = {b: measure.spread(samples[b]).median for b in names}
    chosen, gain = decide(usual, samples)
    return Tuned(name, medians, usual, chosen, gain)


def decide(usual: str, samples: dict[str, list[float]]) -> tuple[str, float]:
    """The backend to take, and how many times faster than the usual one it is."""
    chosen, gain = usual, 1.0
    before = measure.spread(samples[usual]).median
    for name, times in samples.items():
        ratio = measure.ratios(samples[usual], times)
        saved = before - measure.spread(times).median
        if ratio.median >= max(GAIN, gain) and ratio.q1 > 1.0 and saved > LOOKUP:
            chosen, gain = name, ratio.median
    return chosen, gain
