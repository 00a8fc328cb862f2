"""What the attention tests share: problems, the fp64 oracle's verdict on them, and a fake engine.

A `Problem` is one call of `attention` or `attention_varlen` with its upstream gradients. `judge`
runs it on a backend and compares outputs and gradients with the fp64 oracle:

    error <= 2 x the error of plain PyTorch in the same dtype + floor

which is the rule of rule.py. Plain PyTorch is F.scaled_dot_product_attention where it has the
feature, else the reference in the inputs' dtype. The floor is derived, see `_floors`.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
import torch.nn.functional as F
from rule import EPS32, Cast, Draws, as_is, assert_within, one_thread
from torch import Tensor

import fastattn
from fastattn import reference

KINDS = ("normal", "offset", "tiny", "huge", "outliers")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
DIFFERENTIABLE = ("q", "k", "v", "bias", "sinks")

dtype_name = str  # pytest ids: "torch.float32"


def values(shape: Sequence[int], dtype: torch.dtype, kind: str, role: str = "q") -> Tensor:
    """Random values of one of KINDS; `role` says which of q, k, v they are for."""
    x = torch.randn(tuple(shape), dtype=torch.float64)
    if kind == "offset":  # on keys and values: on q too, every logit would be its own rounding
        x = x + (1000.0 if role in "kv" else 0.0)
    elif kind == "tiny":
        x = x * 1e-4
    elif kind == "huge":
        x = x * (12.0 if role in "qk" else 1000.0)
    elif kind == "outliers":
        x = torch.where(torch.rand(tuple(shape), dtype=torch.float64) < 0.01, x * 50.0, x)
    else:
        assert kind == "normal", kind
    return x.to(dtype)


def on_fake_cuda(x: Any) -> Any:
    """A CUDA fake of a CPU tensor's shape, strides and dtype."""
    if not isinstance(x, Tensor):
        return x
    return torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device="cuda")


@dataclass(frozen=True)
class Problem:
    """One call with its upstream gradients; every tensor keeps the strides it was made with."""

    q: Tensor
    k: Tensor
    v: Tensor
    kwargs: dict[str, Any] = field(default_factory=dict)
    cu_seqlens: tuple[Tensor, Tensor] | None = None
    upstream: dict[str, Tensor] | None = None  # by output: "o", "lse", "weights"
    frozen: tuple[str, ...] = ()  # of DIFFERENTIABLE, those that need no gradient

    def with_(self, **kwargs: Any) -> "Problem":
        return replace(self, kwargs={**self.kwargs, **kwargs})

    @property
    def heads(self) -> int:
        return self.q.shape[1]  # of (B, H, S, D) and of (T, H, D)

    def leaves(self, cast: Callable[[Tensor], Tensor] = lambda x: x) -> dict[str, Tensor]:
        """The differentiable inputs; `cast` is applied to each."""
        tensors = {"q": self.q, "k": self.k, "v": self.v}
        tensors |= {n: self.kwargs[n] for n in ("bias", "sinks") if n in self.kwargs}
        return {
            n: cast(x.detach()).requires_grad_(n not in self.frozen) for n, x in tensors.items()
        }

    def call(
        self, attention: Callable, leaves: dict[str, Tensor], **more: Any
    ) -> dict[str, Tensor]:
        """All outputs by name."""
        given = {**self.kwargs, **{n: x for n, x in leaves.items() if n not in "qkv"}}
        cu = self.cu_seqlens or ()
        out = attention(
            leaves["q"], leaves["k"], leaves["v"], *cu, **given, return_lse=True, **more
        )
        return dict(zip(("o", "lse", "weights"), out, strict=False))

    def upstream_for(self, outputs: dict[str, Tensor]) -> dict[str, Tensor]:
        if self.upstream is not None:
            return self.upstream
        gen = torch.Generator(self.q.device).manual_seed(7)
        lse_dtype = torch.promote_types(self.q.dtype, torch.float32)
        return {
            n: torch.randn(x.shape, generator=gen).to(lse_dtype if n == "lse" else self.q.dtype)
            for n, x in outputs.items()
        }


@dataclass(frozen=True)
class Result:
    outputs: dict[str, Tensor]
    grads: dict[str, Tensor]

    def all(self) -> dict[str, Tensor]:
        return {**self.outputs, **{f"d{n}": g for n, g in self.grads.items()}}


def grads_of(
    outputs: dict[str, Tensor], leaves: dict[str, Tensor], upstream: dict[str, Tensor]
) -> dict[str, Tensor]:
    names = [n for n in outputs if n in upstream and outputs[n].requires_grad]
    wanted = {n: x for n, x in leaves.items() if x.requires_grad}
    grads = torch.autograd.grad(
        [outputs[n] for n in names],
        list(wanted.values()),
        [upstream[n].to(outputs[n].dtype) for n in names],
        retain_graph=True,
        allow_unused=True,
        materialize_grads=True,
    )
    return dict(zip(wanted, grads, strict=True))


def run(problem: Problem, backend: str, **more: Any) -> Result:
    """The problem on a backend, through the public functions."""
    fn = fastattn.attention if problem.cu_seqlens is None else fastattn.attention_varlen
    leaves = problem.leaves()
    outputs = problem.call(fn, leaves, backend=backend, **more)
    return Result(outputs, grads_of(outputs, leaves, problem.upstream_for(outputs)))


def _reference_fn(problem: Problem) -> Callable:
    return reference.attention if problem.cu_seqlens is None else reference.attention_varlen


def oracle(problem: Problem) -> tuple[Result, dict[str, Tensor]]:
    """The fp64 result, and the floor of each gradient (see `_floors`)."""
    leaves = problem.leaves(lambda x: x.double())
    outputs = problem.call(_reference_fn(problem), leaves)
    upstream = {n: g.double() for n, g in problem.upstream_for(outputs).items()}
    result = Result(outputs, grads_of(outputs, leaves, upstream))
    return result, _floors(problem, leaves, outputs, upstream)


def _floors(
    problem: Problem,
    leaves: dict[str, Tensor],
    outputs: dict[str, Tensor],
    upstream: dict[str, Tensor],
) -> dict[str, Tensor]:
    """The error that a fused backward cannot avoid, per gradient.

    It forms delta = rowsum(do * o) from an o stored in the inputs' dtype, whose P was rounded to
    that dtype (plain PyTorch does both, but takes another delta), and from fp32 sums (which it does
    not add up in the order of the other term), while dS = P * (dP - delta + dlse). An error of
    delta moves the gradients as an upstream gradient of lse does, so it is what the oracle's graph
    answers to that. Sums of n rounded terms err by the unit roundoff times their terms' 2-norm
    (Higham & Mary 2019, sec. 3: sqrt(n), not n).
    """
    if not outputs["lse"].requires_grad:  # v alone needs a gradient, and delta has no part in it
        return {n: torch.zeros_like(x) for n, x in leaves.items()}
    o = outputs["o"].detach()
    do = upstream.get("o", torch.zeros_like(o))
    u = torch.finfo(problem.q.dtype).eps / 2
    error = u * (do * o).norm(dim=-1) + 4 * EPS32 * do.norm(dim=-1) * o.norm(dim=-1)
    if problem.cu_seqlens is not None:
        error = error.transpose(0, 1)
    if "lse" in upstream:
        error = error + 4 * EPS32 * upstream["lse"].abs()
    if "weights" in upstream:
        w, dw = outputs["weights"].detach(), upstream["weights"]
        noise = 4 * EPS32 * dw.norm(dim=-1) * w.norm(dim=-1)
        noise = noise if noise.dim() == 3 else noise[:, None].expand(-1, problem.heads, -1)
        error = error + _rows(problem, noise)
    fast_exp = _fast_exp(problem)
    if fast_exp:
        P, dP, dS = _pairs(problem, upstream)
        error = error + _rows(problem, u * (P * dP).norm(dim=-1))
    error = torch.where(outputs["lse"].detach().isfinite() & error.isfinite(), error, 0.0)
    floors = {n: g.abs() for n, g in grads_of(outputs, leaves, {"lse": error}).items()}
    if fast_exp and "bias" in floors:  # which adds dS up as it is
        squares = dS.nan_to_num(0.0).square().sum_to_size(leaves["bias"].shape)
        floors["bias"] = floors["bias"] + fast_exp * squares.sqrt()
    return floors


def _exponents_rounded(weights: Tensor) -> Tensor:
    """The error of exp(y) where y = log(weight) is rounded to fp32, before and after its base is
    changed. The mean over heads is no more than that of the mean (-x log x is concave)."""
    return EPS32 * torch.special.entr(weights).abs()


def _fast_exp(problem: Problem) -> float:
    """The relative error of P: exp need not be finer than 1/128 of the rounding that P gets before
    the product with v."""
    dtype = problem.q.dtype
    return torch.finfo(dtype).eps / 256 if dtype != torch.float32 else 0.0


def _rows(problem: Problem, x: Tensor) -> Tensor:
    """(B, H, Sq) in the layout of lse."""
    if problem.cu_seqlens is None:
        return x
    lens = problem.cu_seqlens[0].diff().tolist()
    rows = torch.cat([of[:, :n] for of, n in zip(x, lens, strict=True)], dim=-1)
    return F.pad(rows, (0, problem.q.shape[0] - rows.shape[-1]))


def _pairs(problem: Problem, upstream: dict[str, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    """P, dP and dS in fp64, (B, H, Sq, Sk): all pairs of a row and a key."""
    leaves = problem.leaves(lambda x: x.double())
    whole = problem.with_(return_weights=True)
    shape = whole.call(_reference_fn(problem), leaves)["weights"].shape
    added = torch.zeros(shape, dtype=torch.float64) + leaves.get("bias", 0.0)
    added = added.detach().requires_grad_()
    outputs = whole.call(_reference_fn(problem), {**leaves, "bias": added})
    P = outputs["weights"]
    do = upstream.get("o", torch.zeros_like(outputs["o"]))
    (dP,) = torch.autograd.grad(outputs["o"], P, do, retain_graph=True)
    given = {n: g for n, g in upstream.items() if n != "weights"}
    if "weights" in upstream:
        dw = upstream["weights"]
        given["weights"] = (dw if dw.dim() == 4 else dw[:, None] / shape[1]).expand(shape)
    return P.detach(), dP, grads_of(outputs, {"bias": added}, given)["bias"]


def plain_results(problem: Problem) -> Draws:
    """Plain PyTorch in the problem's dtype, first in two orders of its sums over D."""

    def run(cast: Cast, order: Tensor | None = None) -> dict[str, Tensor]:
        leaves = problem.leaves(cast)
        given = dict(leaves)
        if order is not None:
            given |= {n: leaves[n][..., order] for n in "qk"}
        outputs = problem.call(_reference_fn(problem), given)
        return Result(outputs, grads_of(outputs, leaves, problem.upstream_for(outputs))).all()

    order = torch.randperm(problem.q.shape[-1])
    return Draws(run, lambda: run(as_is, order))


def sdpa(problem: Problem) -> Draws:
    """F.scaled_dot_product_attention on a problem that has nothing but causal, mask, scale, GQA."""

    def run(cast: Cast) -> dict[str, Tensor]:
        leaves, given = problem.leaves(cast), dict(problem.kwargs)
        o = F.scaled_dot_product_attention(
            leaves["q"],
            leaves["k"],
            leaves["v"],
            attn_mask=given.pop("mask", None),
            is_causal=given.pop("causal", False),
            scale=given.pop("scale", None),
            enable_gqa=problem.q.shape[1] != problem.k.shape[1],
        )
        assert not given, f"F.scaled_dot_product_attention has no {sorted(given)}"
        outputs = {"o": o}
        return Result(outputs, grads_of(outputs, leaves, problem.upstream_for(outputs))).all()

    return Draws(run)


def judge(problem: Problem, backend: str, *, against: str = "reference", **more: Any) -> Result:
    """Run the problem on the backend and hold outputs and gradients to the rule above.

    against: "reference" or "sdpa", the plain PyTorch whose error is the measure.
    """
    if against == "sdpa":  # which has one output
        o = problem.q.new_empty(*problem.q.shape[:-1], problem.v.shape[-1])
        problem = replace(problem, upstream=problem.upstream_for({"o": o}))
    got = run(problem, backend, **more)
    with one_thread():
        right, floors = oracle(problem)
    plain = sdpa(problem) if against == "sdpa" else plain_results(problem)
    compare(problem, got, right, floors, plain)
    return got


def compare(
    problem: Problem, got: Result, right: Result, floors: dict[str, Tensor], plain: Draws
) -> None:
    """The verdict of `judge`: `got` against the oracle, measured by plain PyTorch's error."""
    fast_exp = _fast_exp(problem)
    for name, x in right.outputs.items():
        if name in plain:
            floor: Tensor | float = fast_exp if name == "lse" else 0.0
            if name == "weights":
                floor = _exponents_rounded(x.detach())
            assert_within(name, got.outputs[name], x, plain[name], floor)
        else:  # lse next to SDPA, which gives none: fp32 rounding of a sum of Sk terms
            x = x.detach()
            scale = float(x[x.isfinite()].abs().amax()) if x.isfinite().any() else 0.0
            logits = float(right_logits(problem))
            assert_within(
                name, got.outputs[name], x, [x], fast_exp + 4 * EPS32 * (1.0 + scale + logits)
            )
    for name, x in right.grads.items():
        assert_within(f"d{name}", got.grads[name], x, plain[f"d{name}"], floors[name])
        assert got.grads[name].dtype == got_dtype(problem, name)


def right_logits(problem: Problem) -> Tensor:
    """The largest |logit| before the features: what fp32 rounds."""
    q, k = problem.q.double(), problem.k.double()
    scale = problem.kwargs.get("scale") or problem.q.shape[-1] ** -0.5
    if 0 in (*q.shape, *k.shape):
        return torch.zeros(())
    return scale * q.norm(dim=-1).amax() * k.norm(dim=-1).amax()


def got_dtype(problem: Problem, name: str) -> torch.dtype:
    return (getattr(problem, name) if name in "qkv" else problem.kwargs[name]).dtype


# ------------------------------------------------------------------------------ making problems


def padded(
    b: int = 2,
    h: int = 2,
    hk: int | None = None,
    sq: int = 37,
    sk: int | None = None,
    d: int = 32,
    dv: int | None = None,
    dtype: torch.dtype = torch.float32,
    kind: str = "normal",
    **kwargs: Any,
) -> Problem:
    """A problem of (B, H, S, D) tensors."""
    hk, sk, dv = hk or h, sq if sk is None else sk, d if dv is None else dv
    return Problem(
        values((b, h, sq, d), dtype, kind, "q"),
        values((b, hk, sk, d), dtype, kind, "k"),
        values((b, hk, sk, dv), dtype, kind, "v"),
        kwargs,
    )


def packed(
    lens_q: Sequence[int],
    lens_k: Sequence[int] | None = None,
    h: int = 2,
    hk: int | None = None,
    d: int = 32,
    dv: int | None = None,
    dtype: torch.dtype = torch.float32,
    kind: str = "normal",
    slack: int = 0,
    cu_dtype: torch.dtype = torch.int32,
    **kwargs: Any,
) -> Problem:
    """A problem of (T, H, D) tensors; `slack` more tokens lie behind the last sequence."""
    lens_k, hk, dv = lens_q if lens_k is None else lens_k, hk or h, d if dv is None else dv
    cu_q, cu_k = (cumulative(lens, cu_dtype) for lens in (lens_q, lens_k))
    tq, tk = sum(lens_q) + slack, sum(lens_k) + slack
    return Problem(
        values((tq, h, d), dtype, kind, "q"),
        values((tk, hk, d), dtype, kind, "k"),
        values((tk, hk, dv), dtype, kind, "v"),
        kwargs,
        (cu_q, cu_k),
    )


def cumulative(lens: Sequence[int], dtype: torch.dtype = torch.int32) -> Tensor:
    return torch.tensor([0, *lens]).cumsum(0).to(dtype)


# --------------------------------------------------------------- autograd without a device


def fake_grads(outputs: Sequence[Tensor], leaves: Sequence[Tensor]) -> list[Tensor | None]:
    """Gradients of sum(outputs), by running the nodes of the graph one after the other.

    torch 2.14.1 built for CUDA cannot run its own engine under FakeTensorMode(device="cuda") where
    there is no GPU ("hasPrimaryContext expects a valid device index": the mode's stand-in device
    guard reports one device, the CUDA hooks none). The nodes themselves run. Like the engine this
    sums a gradient over the dimensions that its input was broadcast over.
    """
    waiting: dict[Any, int] = {}  # edges into a node that have not delivered yet
    reached = {x.grad_fn for x in outputs}  # outputs of one op share a node
    todo = list(reached)
    while todo:
        for parent, _ in todo.pop().next_functions:
            if parent is None:
                continue
            waiting[parent] = waiting.get(parent, 0) + 1
            if parent not in reached:
                reached.add(parent)
                todo.append(parent)

    arrived: dict[Any, dict[int, Tensor]] = {}

    def deliver(node: Any, slot: int, grad: Tensor | None) -> None:
        if grad is None:
            return
        grad = grad.sum_to_size(tuple(node._input_metadata[slot].shape))
        slots = arrived.setdefault(node, {})
        slots[slot] = slots[slot] + grad if slot in slots else grad

    for x in outputs:
        deliver(x.grad_fn, x.output_nr, torch.ones_like(x))
    ready = [node for node in reached if not waiting.get(node)]
    found: dict[int, Tensor] = {}
    while ready:
        node = ready.pop()
        slots = arrived.get(node, {})
        grads: Any = ()
        if slots and hasattr(node, "variable"):
            found[id(node.variable)] = slots[0]
        elif slots:
            arguments = [slots.get(i) for i in range(len(node._input_metadata))]
            with torch.no_grad():  # as the engine, without create_graph
                grads = node.apply(*arguments) if hasattr(node, "apply") else node(*arguments)
        grads = grads if isinstance(grads, tuple) else (grads,)
        if len(grads) > len(node.next_functions):  # a Function's inputs that are no tensors: None
            there = iter([g for g in grads if g is not None])
            grads = tuple(p and next(there, None) for p, _ in node.next_functions)
        for i, (parent, slot) in enumerate(node.next_functions):
            if parent is None:
                continue
            deliver(parent, slot, grads[i] if slots else None)
            waiting[parent] -= 1
            if not waiting[parent]:
                ready.append(parent)
    return [found.get(id(x)) for x in leaves]


# ---------------------------------------------------------------------------------- the features


def _lens(n: int, longest: int, dtype: torch.dtype = torch.int32) -> Tensor:
    """n lengths from 0 to `longest`, the longest among them."""
    lens = torch.randint(0, longest + 1, (n,))
    lens[-1:] = longest
    return lens.to(dtype)


def _mask(*shape: int) -> Tensor:
    """Three quarters shown; every row shows a key where there is one."""
    mask = torch.rand(*shape) < 0.75
    mask[..., :1] = True
    return mask


# Each takes (B, H, Sq, Sk, dtype) and returns arguments of attention.
FEATURES: dict[str, Callable[[int, int, int, int, torch.dtype], dict[str, Any]]] = {
    "plain": lambda b, h, m, n, t: {},
    "scale": lambda b, h, m, n, t: {"scale": 0.31},
    "causal": lambda b, h, m, n, t: {"causal": True},
    "bottom_right": lambda b, h, m, n, t: {"causal": "bottom_right"},
    "window": lambda b, h, m, n, t: {"window": (9, 5)},
    "window_left": lambda b, h, m, n, t: {"window": (11, None)},
    "window_right": lambda b, h, m, n, t: {"window": (None, 0)},
    "window_causal": lambda b, h, m, n, t: {"window": (16, None), "causal": True},
    "window_bottom_right": lambda b, h, m, n, t: {"window": (16, 3), "causal": "bottom_right"},
    "mask": lambda b, h, m, n, t: {"mask": _mask(b, h, m, n)},
    "key_mask": lambda b, h, m, n, t: {"mask": _mask(b, 1, 1, n)},
    "bias": lambda b, h, m, n, t: {"bias": values((b, h, m, n), t, "normal")},
    "bias_fp32": lambda b, h, m, n, t: {"bias": values((1, h, m, n), torch.float32, "normal")},
    "q_lens": lambda b, h, m, n, t: {"q_lens": _lens(b, m)},
    "k_lens": lambda b, h, m, n, t: {"k_lens": _lens(b, n)},
    "lens_bottom_right": lambda b, h, m, n, t: {
        "q_lens": _lens(b, m, torch.int64),
        "k_lens": _lens(b, n, torch.int64),
        "causal": "bottom_right",
    },
    "alibi": lambda b, h, m, n, t: {"alibi_slopes": torch.rand(h) * 0.2},
    "alibi_batch": lambda b, h, m, n, t: {"alibi_slopes": torch.rand(b, h) * 0.2},
    "softcap": lambda b, h, m, n, t: {"softcap": 1.7},
    "sinks": lambda b, h, m, n, t: {"sinks": torch.randn(h)},
    "dropout": lambda b, h, m, n, t: {"dropout_p": 0.3, "seed": 2**40 + 11},
    "weights": lambda b, h, m, n, t: {"return_weights": True},
    "weights_mean": lambda b, h, m, n, t: {"return_weights": "mean"},
    "all": lambda b, h, m, n, t: {
        "mask": _mask(b, 1, m, n),
        "bias": values((h, 1, n), t, "normal"),
        "causal": "bottom_right",
        "window": (40, 2),
        "q_lens": _lens(b, m),
        "k_lens": _lens(b, n),
        "alibi_slopes": torch.rand(h) * 0.1,
        "softcap": 3.0,
        "sinks": torch.randn(h),
        "scale": 0.2,
        "dropout_p": 0.2,
        "seed": 5,
        "return_weights": True,
    },
}


def featured(feature: str, **shape: Any) -> Problem:
    """`padded(**shape)` with a feature of FEATURES."""
    problem = padded(**shape)
    (b, h, m, _), n = problem.q.shape, problem.k.shape[2]
    return problem.with_(**FEATURES[feature](b, h, m, n, problem.q.dtype))
