"""Direct calls of torch.ops.fastattn.* with hostile tensors and numbers: what the bindings alone
must keep inside its tensors.

The ops are those that a valid call runs, forward and backward, with the arguments it hands them.
"""

import math
from collections.abc import Callable
from typing import Any

import torch
from hypothesis import strategies as st
from test_attention_ops import op_calls_of
from torch import Tensor

from fuzz.case import Case, MismatchError, Valid, backward_of, told

_NUMBERS = (-1, 0, 1, 2, 7, 2**31 - 1, 2**31, 2**62, -(2**63), 2**63 - 1)
_REALS = (0.0, -1.0, 0.5, 1.0, math.nan, math.inf, 1e300, 5e-324)
_DTYPES = (
    torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.int64, torch.int32,
    torch.bool, torch.uint8, torch.complex64,
)  # fmt: skip
_HUGE = 2**40


def ops_of(valid: Valid) -> list[tuple[Any, tuple[Any, ...]]]:
    def both() -> None:
        tensors = {
            n: x.detach().clone().requires_grad_()
            for n, x in valid.args.items()
            if isinstance(x, Tensor) and x.is_floating_point()
        }
        backward_of(valid.fn(**{**valid.args, **tensors}))

    return [pair for _, pair in sorted(op_calls_of(valid.passes or both).items())]


@st.composite
def hostile_tensor(draw: Any, x: Tensor) -> Tensor:
    """Another shape, dtype, layout or content than x's; storage of its own."""
    x = x.detach()
    if x.numel() * x.element_size() > x.untyped_storage().nbytes():
        return x  # made so by an earlier draw: no memory has room for it
    x = x.clone()
    how = draw(st.sampled_from([
        "dtype", "shorter", "longer", "empty", "scalar", "flat", "deeper", "transposed",
        "zero strides", "huge", "every other", "negative", "odd", "one element", "shifted",
        "backwards",
    ]))  # fmt: skip
    d = draw(st.integers(0, max(x.dim() - 1, 0)))
    if how == "dtype":
        return x.to(draw(st.sampled_from(_DTYPES)))
    if how == "scalar" or not x.dim():
        return x.reshape(-1)[:1].sum()
    if how == "shorter":
        return x.narrow(d, 0, max(x.shape[d] - draw(st.integers(1, 3)), 0))
    if how == "longer":
        return torch.cat([x, x.narrow(d, 0, min(1, x.shape[d]))], d)
    if how == "empty":
        return x.narrow(d, 0, 0)
    if how == "flat":
        return x.reshape(-1)
    if how == "deeper":
        return x[None]
    if how == "transposed":
        return x.transpose(0, -1)
    if how == "zero strides":
        return x.reshape(-1)[:1].as_strided(x.shape, [0] * x.dim()) if x.numel() else x
    if how == "huge":
        shape = list(x.shape)
        shape[d] = draw(st.sampled_from([_HUGE, 2**31, 70_000]))
        return x.new_zeros([]).expand(shape)
    if how == "every other":
        return x.repeat_interleave(2, -1)[..., ::2]
    if how == "negative":
        return -torch.ones_like(x) if x.dtype != torch.bool else x
    if how == "odd":
        odd = draw(st.sampled_from([math.nan, math.inf, 1e30, 2**40]))
        odd = odd if x.is_floating_point() else 2**30
        return torch.full(x.shape, odd, dtype=torch.float64).to(x.dtype)
    if how == "one element":
        return x.reshape(-1)[:1]
    if how == "shifted":  # aligned to its element alone
        flat = x.new_zeros(x.numel() + 1)
        flat[1:] = x.reshape(-1)
        return flat[1:].view(x.shape)
    return x.flip(d)


@st.composite
def hostile(draw: Any, x: Any) -> Any:
    if isinstance(x, Tensor):
        return draw(st.one_of(hostile_tensor(x), hostile_tensor(x), st.none()))
    if isinstance(x, bool):
        return not x
    if isinstance(x, int):
        return draw(st.sampled_from([*_NUMBERS, x + 1, x - 1]))
    if isinstance(x, float):
        return draw(st.sampled_from(_REALS))
    if x is None:
        return draw(hostile_tensor(torch.randn(draw(st.sampled_from([(), (1,), (3,), (2, 5)])))))
    return x


def without(x: Any, size: int) -> Any:
    """Every dimension of that size, in every tensor, is 0: sizes that agree, and divide nothing."""
    if isinstance(x, (list, tuple)):
        return [without(y, size) for y in x]
    if not isinstance(x, Tensor):
        return x
    for d in range(x.dim()):
        if x.shape[d] == size:
            x = x.narrow(d, 0, 0)
    return x


def _sizes(x: Any) -> set[int]:
    if isinstance(x, (list, tuple)):
        return set().union(*map(_sizes, x))
    return set(x.shape) if isinstance(x, Tensor) else set()


def _failing(error: Exception) -> Callable[[], str]:
    def run() -> str:
        raise MismatchError(f"the right call failed: {error!r}")

    return run


@st.composite
def raw_cases(draw: Any, valid: Valid) -> Case:
    try:
        found = ops_of(valid)
    except Exception as error:
        return Case("raw", lambda: told(valid.fn, valid.args), _failing(error))
    if not found:  # the call was plain PyTorch, float64 perhaps
        return Case("raw", lambda: told(valid.fn, valid.args), lambda: "accepted")
    op, right = draw(st.sampled_from(found))
    args, few = list(right), 1
    if (sizes := sorted(_sizes(right))) and draw(st.integers(0, 2)) == 0:
        args, few = without(right, draw(st.sampled_from(sizes))), 0
    for _ in range(draw(st.integers(few, 3))):
        i = draw(st.integers(0, len(args) - 1))
        if isinstance(args[i], (list, tuple)):
            args[i] = [draw(hostile(x)) for x in args[i]]
        else:
            args[i] = draw(hostile(args[i]))

    def run() -> str:
        try:
            with torch.no_grad():
                found = op(*args)
        except Exception:  # whatever it says: a direct call has no manners to keep but to return
            return "rejected"
        for x in found if isinstance(found, (list, tuple)) else (found,):
            if isinstance(x, Tensor) and x.device.type == "cpu" and x.numel() < 2**24:
                x.clone()  # what it returned is there
        return "accepted"

    about = {f"arg{i}": x for i, x in enumerate(args)}
    return Case("raw", lambda: told(op.name(), about) if hasattr(op, "name") else str(op), run)
