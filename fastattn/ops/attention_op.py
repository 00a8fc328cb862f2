"""The torch.library ops beneath ``fastattn.attention``: schema, fake, autograd, vmap.

``attention_fwd`` and ``attention_bwd`` serve padded and packed calls alike: with ``cu_seqlens_q``
q, k, v are (T, H, D), else (B, H, S, D). Kernels register under their dispatch keys (the CPU ones
in csrc/bindings/attention.cpp); this file holds what is the same for all of them.

``attention_triton_fwd`` and ``_bwd`` are the same ops on the Triton kernels (registered in
attention_triton.py), ``attention_cuda_fwd`` and ``_bwd`` on the CUDA C++ ones (attention_cuda.py):
one more number, ``deterministic``, and otherwise made by the same functions.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fastattn.kernels.contract import (
    NEED_DBIAS,
    NEED_DK,
    NEED_DQ,
    NEED_DSINKS,
    NEED_DV,
    WEIGHTS_FULL,
    WEIGHTS_MEAN,
    WEIGHTS_NONE,
    empty_as,
)
from fastattn.ops._eager import below_autograd, functorch_active, make_function
from fastattn.ops._fakes import register_fake

# Tensor arguments shared by both ops, then the numbers.
_SHARED = (
    "Tensor? mask, Tensor? bias, Tensor? q_lens, Tensor? k_lens, Tensor? cu_seqlens_q, "
    "Tensor? cu_seqlens_k, Tensor? alibi_slopes, Tensor? sinks, Tensor? seed, float scale, "
    "int causal, int window_left, int window_right, float softcap, float dropout_p, int weights, "
    "SymInt max_seqlen_q, SymInt max_seqlen_k"
)
_N_TENSORS = _SHARED.count("?")

# Suffix of the op names -> what their schemas have behind the shared numbers.
_BACKENDS = {"": "", "_triton": ", bool deterministic", "_cuda": ", bool deterministic"}

CAUSAL_NONE, CAUSAL_TOP_LEFT, CAUSAL_BOTTOM_RIGHT = 0, 1, 2

_lib = torch.library.Library("fastattn", "DEF")
_lib.define("cpu_isas_available(int _) -> int")
_lib.define("cpu_isa_force(int isa) -> int")
for _suffix, _more in _BACKENDS.items():
    _lib.define(
        f"attention{_suffix}_fwd(Tensor q, Tensor k, Tensor v, {_SHARED}{_more})"
        " -> (Tensor o, Tensor lse, Tensor lse_lo, Tensor weights)",
        tags=(torch.Tag.pt2_compliant_tag,),
    )
    _lib.define(
        f"attention{_suffix}_bwd(Tensor? do, Tensor? dlse, Tensor? dweights, Tensor q, Tensor k, "
        f"Tensor v, Tensor? o, Tensor lse, Tensor lse_lo, {_SHARED}{_more}, int need)"
        " -> (Tensor dq, Tensor dk, Tensor dv, Tensor dbias, Tensor dsinks)",
        tags=(torch.Tag.pt2_compliant_tag,),
    )
# What attention_cuda_fwd and _bwd run once their first-use checks allow it; not for callers.
_lib.define(
    f"attention_cuda_kernel_fwd(Tensor q, Tensor k, Tensor v, {_SHARED})"
    " -> (Tensor o, Tensor lse, Tensor lse_lo, Tensor weights)"
)
# dbias as it was summed (a 4-dimensional tensor), dsinks in fp32.
_lib.define(
    "attention_cuda_kernel_bwd(Tensor? do, Tensor? dlse, Tensor? dweights, Tensor q, Tensor k, "
    f"Tensor v, Tensor? o, Tensor lse, Tensor lse_lo, {_SHARED}, bool deterministic, int need)"
    " -> (Tensor dq, Tensor dk, Tensor dv, Tensor dbias, Tensor dsinks)"
)


def _fwd_fake(q: Tensor, k: Tensor, v: Tensor, *shared: Any) -> tuple[Tensor, ...]:
    args = Shared(*shared)
    o = empty_as(q, (*q.shape[:-1], v.shape[-1]))
    f32: dict[str, Any] = {"dtype": torch.float32}
    if args.cu_seqlens_q is not None:
        b, h = args.cu_seqlens_q.shape[0] - 1, q.shape[1]
        sq, sk = args.max_seqlen_q, args.max_seqlen_k
        lse = q.new_empty((h, q.shape[0]), **f32)
    else:
        b, h, sq = q.shape[:3]
        sk = k.shape[2]
        lse = q.new_empty((b, h, sq), **f32)
    lse_lo = torch.empty_like(lse)
    shapes = {WEIGHTS_NONE: (0,), WEIGHTS_FULL: (b, h, sq, sk), WEIGHTS_MEAN: (b, sq, sk)}
    return o, lse, lse_lo, q.new_empty(shapes[args.weights])


def _bwd_fake(
    do: Tensor | None,
    dlse: Tensor | None,
    dweights: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    o: Tensor | None,
    lse: Tensor,
    lse_lo: Tensor,
    *rest: Any,
) -> tuple[Tensor, ...]:
    args, need = Shared(*rest[:-1]), rest[-1]

    def same(x: Tensor, bit: int) -> Tensor:
        return empty_as(x, tuple(x.shape)) if need & bit else q.new_empty((0,))

    def flat(x: Tensor | None, bit: int) -> Tensor:
        return x.new_empty(x.shape) if x is not None and need & bit else q.new_empty((0,))

    return (
        same(q, NEED_DQ),
        same(k, NEED_DK),
        same(v, NEED_DV),
        flat(args.bias, NEED_DBIAS),
        flat(args.sinks, NEED_DSINKS),
    )


@dataclass(slots=True)
class Shared:
    """The arguments that both ops share, by name and in the schema's order."""

    mask: Tensor | None
    bias: Tensor | None
    q_lens: Tensor | None
    k_lens: Tensor | None
    cu_seqlens_q: Tensor | None
    cu_seqlens_k: Tensor | None
    alibi_slopes: Tensor | None
    sinks: Tensor | None
    seed: Tensor | None
    scale: float
    causal: int
    window_left: int
    window_right: int
    softcap: float
    dropout_p: float
    weights: int
    max_seqlen_q: int
    max_seqlen_k: int
    deterministic: bool = True

    def reference_kwargs(self) -> dict[str, Any]:
        """The same call in the words of ``fastattn.reference``."""
        limits = tuple(None if w < 0 else w for w in (self.window_left, self.window_right))
        kwargs: dict[str, Any] = {
            "mask": self.mask,
            "bias": self.bias,
            "causal": (False, True, "bottom_right")[self.causal],
            "window": None if limits == (None, None) else limits,
            "alibi_slopes": self.alibi_slopes,
            "softcap": self.softcap or None,
            "sinks": self.sinks,
            "scale": self.scale,
            "dropout_p": self.dropout_p,
            "seed": self.seed,
            "return_lse": True,
            "return_weights": (False, True, "mean")[self.weights],
        }
        if self.cu_seqlens_q is not None:
            kwargs |= {"max_seqlen_q": self.max_seqlen_q, "max_seqlen_k": self.max_seqlen_k}
        else:
            kwargs |= {"q_lens": self.q_lens, "k_lens": self.k_lens}
        return kwargs


# Positions of the differentiable arguments of attention_fwd.
_BIAS, _SINKS = 1, 7  # positions among the shared arguments
_DIFFERENTIABLE = (0, 1, 2, 3 + _BIAS, 3 + _SINKS)
_NEED_BITS = (NEED_DQ, NEED_DK, NEED_DV, NEED_DBIAS, NEED_DSINKS)
_NUMBER_WEIGHTS = 6  # position of `weights` behind the tensors


def _remember(ctx: Any, needs: tuple[bool, ...], inputs: tuple[Any, ...], output: Any) -> None:
    """What the backward needs of q, k, v, *shared and the outputs; needs: q, k, v, bias, sinks."""
    q, k, v, *shared = inputs
    o, lse, lse_lo, _ = output
    dq, dk, dv, dbias, dsinks = needs
    ctx.need = need = dq | dk << 1 | dv << 2 | dbias << 3 | dsinks << 4
    ctx.numbers = shared[_N_TENSORS:]
    ctx.set_materialize_grads(False)
    # dv = P^T do needs neither o nor delta.
    ctx.save_for_backward(
        q, k, v, o if need & ~NEED_DV else None, lse, lse_lo, *shared[:_N_TENSORS]
    )


def _fwd_setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.mark_non_differentiable(output[2])
    _remember(ctx, tuple(ctx.needs_input_grad[i] for i in _DIFFERENTIABLE), inputs, output)


def _bwd_setup(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    ctx.save_for_backward(*inputs[:6], *inputs[9:18])
    ctx.numbers = inputs[18:]
    ctx.set_materialize_grads(False)


def _by_formula(q: Tensor, k: Tensor, v: Tensor, shared: Shared) -> tuple[Tensor, ...]:
    """o, lse and, where asked for, the weights, in plain PyTorch."""
    from fastattn import reference

    kwargs = shared.reference_kwargs()
    found: Any
    if shared.cu_seqlens_q is not None and shared.cu_seqlens_k is not None:
        found = reference.attention_varlen(
            q, k, v, shared.cu_seqlens_q, shared.cu_seqlens_k, **kwargs
        )
    else:
        found = reference.attention(q, k, v, **kwargs)
    return found  # type: ignore[no-any-return]


def _bwd_backward(ctx: Any, *grads_of_grads: Tensor | None) -> tuple[Any, ...]:
    """Double backward: differentiate the reference formula twice, in at least fp32.

    o and lse are functions of q, k, v, so their part of the derivative is in the formula.
    """
    saved = ctx.saved_tensors
    *numbers, need = ctx.numbers
    shared = Shared(*saved[6:], *numbers)
    upstream, (q, k, v) = saved[:3], saved[3:6]
    wide = torch.promote_types(q.dtype, torch.float32)

    def leaf(x: Tensor | None) -> Any:
        if x is None or not x.is_floating_point():
            return x
        return x.detach().to(wide).requires_grad_()

    with torch.enable_grad():
        q_, k_, v_, bias_, sinks_ = map(leaf, (q, k, v, shared.bias, shared.sinks))
        upstream_ = tuple(map(leaf, upstream))
        shared.bias, shared.sinks = bias_, sinks_
        outputs = _by_formula(q_, k_, v_, shared)
        pairs = [(o, g) for o, g in zip(outputs, upstream_, strict=False) if g is not None]
        inputs = [
            x for i, x in enumerate((q_, k_, v_, bias_, sinks_)) if need >> i & 1 and x is not None
        ]
        first = torch.autograd.grad(
            [o for o, _ in pairs],
            inputs,
            [g.to(o.dtype) for o, g in pairs],
            create_graph=True,
            allow_unused=True,
        )
        wanted = [gg for i, gg in enumerate(grads_of_grads) if need >> i & 1]
        use = [
            (g, gg.to(g.dtype))
            for g, gg in zip(first, wanted, strict=True)
            if g is not None and gg is not None
        ]
        leaves = [*upstream_, q_, k_, v_, bias_, sinks_]
        present = [x for x in leaves if x is not None]
        second = iter(
            torch.autograd.grad(
                [g for g, _ in use], present, [gg for _, gg in use], allow_unused=True
            )
            if use
            else [None] * len(present)
        )
    originals: list[Any] = [*upstream, q, k, v, saved[7], saved[13]]
    out = []
    for original, x in zip(originals, leaves, strict=True):
        g = next(second) if x is not None else None
        out.append(None if g is None else g.to(original.dtype))
    result: list[Any] = [None] * (9 + _N_TENSORS + len(ctx.numbers))
    result[:6] = out[:6]
    result[9 + 1], result[9 + 7] = out[6], out[7]
    return tuple(result)


def _vmap_of_none(op: Any, in_dims: tuple[Any, ...], args: tuple[Any, ...]) -> Any:
    """A batch of 0: the shapes of one call on zeros."""
    one = [
        a if d is None else a.new_zeros([n for i, n in enumerate(a.shape) if i != d % a.dim()])
        for a, d in zip(args, in_dims, strict=True)
    ]
    out = tuple(r.new_empty((0, *r.shape)) for r in op(*one))
    return out, tuple(0 for _ in out)


def _vmap_by_loop(op: Any, info: Any, in_dims: tuple[Any, ...], args: tuple[Any, ...]) -> Any:
    """Right for every argument; a loop over the mapped dimension."""
    results = []
    for i in range(info.batch_size):
        one = [a if d is None else a.select(d, i) for a, d in zip(args, in_dims, strict=True)]
        results.append(op(*one))
    out = tuple(torch.stack(parts) for parts in zip(*results, strict=True))
    return out, tuple(0 for _ in out)


def _logical_dim(x: Tensor, dim: int | None) -> int:
    return x.dim() - (dim is not None)


def _fold(x: Tensor | None, dim: int | None, size: int) -> Tensor | None:
    """The mapped dimension joins the batch; a 1-d placeholder for "absent" is passed as it is."""
    if x is None:
        return None
    if _logical_dim(x, dim) <= 1:
        return x if dim is None else x.select(dim, 0)
    x = x.movedim(dim, 0) if dim is not None else x.expand(size, *x.shape)
    x = x.flatten(0, 1)
    return x.contiguous() if x.dim() == 3 else x  # lse: of a batch of 1 the expansion is a view


def _vmap_batched(n_lead: int, op: Any) -> Any:
    """vmap rule: the first ``n_lead`` arguments are (B, H, ...); they fold if no other is given."""

    def rule(info: Any, in_dims: tuple[Any, ...], *args: Any) -> Any:
        if info.batch_size == 0:
            return _vmap_of_none(op, in_dims, args)
        if any(x is not None for x in args[n_lead : n_lead + 9]):  # masks, lengths, sinks, seed
            return _vmap_by_loop(op, info, in_dims, args)
        n = info.batch_size
        lead = [_fold(x, d, n) for x, d in zip(args[:n_lead], in_dims[:n_lead], strict=True)]
        results = op(*lead, *args[n_lead:])
        out = tuple(
            r.unflatten(0, (n, r.shape[0] // n)) if r.dim() > 1 else r.expand(n, *r.shape)
            for r in results
        )
        return out, tuple(0 for _ in out)

    return rule


# ---- the eager path ----------------------------------------------------------------------------
# Functions of our own over the same setup and backward as register_autograd's: see _eager.py.


def _flat_functions(name: str, op: Any, setup: Any, backward: Any, n_lead: int) -> tuple[Any, Any]:
    """The op as an autograd Function over its own arguments: for eager, and for ``torch.func``.

    ``torch.func`` wants ``setup_context`` apart and a vmap rule; that form binds the signature anew
    at every call (25 us), so eager has one of its own.
    """

    def eager_forward(ctx: Any, *args: Any) -> Any:
        output = below_autograd(op, args)
        setup(ctx, args, output)
        return output

    def rule(info: Any, in_dims: tuple[Any, ...], *args: Any) -> Any:
        return _vmap_batched(n_lead, functorch.apply)(info, in_dims, *args)

    functorch = make_function(
        name + "Functorch",
        forward=lambda *args: below_autograd(op, args),
        setup_context=lambda ctx, inputs, output: setup(ctx, inputs, output),
        backward=backward,
        vmap=rule,
    )
    return make_function(name, forward=eager_forward, backward=backward), functorch


class _Ops:
    """One backend's pair of ops with all that is the same for every backend: fake, autograd for the
    compilers, autograd for eager, vmap."""

    def __init__(self, suffix: str) -> None:
        names = [f"attention{suffix}_{direction}" for direction in ("fwd", "bwd")]
        packets = [getattr(torch.ops.fastattn, name) for name in names]
        self.fwd_op, self.bwd_op = (packet.default for packet in packets)
        self.eager_forward = make_function(
            "_Forward", forward=self._slim_forward, backward=self._slim_backward
        )
        _, self.functorch_forward = _flat_functions(
            "_Forward", self.fwd_op, _fwd_setup, self._fwd_backward, 3
        )
        self.eager_backward, self.functorch_backward = _flat_functions(
            "_Backward", self.bwd_op, _bwd_setup, _bwd_backward, 9
        )
        for name, packet, n_lead, fake, backward, setup in zip(
            names, packets, (3, 9), (_fwd_fake, _bwd_fake), (self._fwd_backward, _bwd_backward),
            (_fwd_setup, _bwd_setup), strict=True,
        ):  # fmt: skip
            full = f"fastattn::{name}"
            register_fake(full, fake, lib=_lib)
            torch.library.register_autograd(full, backward, setup_context=setup, lib=_lib)
            torch.library.register_vmap(full, _vmap_batched(n_lead, packet), lib=_lib)

    def _gradients(
        self, ctx: Any, do: Tensor | None, dlse: Tensor | None, dweights: Tensor | None
    ) -> list[Tensor | None]:
        """Of q, k, v, bias and sinks."""
        if do is None and dlse is None and dweights is None:
            return [None] * len(_NEED_BITS)
        if ctx.numbers[_NUMBER_WEIGHTS] == WEIGHTS_NONE:
            dweights = None
        q, k, v, o, lse, lse_lo, *tensors = ctx.saved_tensors
        if do is None:
            o = None
        need = ctx.need
        grads = self.backward(
            do, dlse, dweights, q, k, v, o, lse, lse_lo, *tensors, *ctx.numbers, need
        )
        return [g if need & bit else None for g, bit in zip(grads, _NEED_BITS, strict=True)]

    def _fwd_backward(
        self, ctx: Any, do: Tensor | None, dlse: Tensor | None, _: Any, dweights: Tensor | None
    ) -> tuple[Any, ...]:
        grads: list[Any] = [None] * (3 + _N_TENSORS + len(ctx.numbers))
        for i, grad in zip(_DIFFERENTIABLE, self._gradients(ctx, do, dlse, dweights), strict=True):
            grads[i] = grad
        return tuple(grads)

    def _slim_forward(self, ctx: Any, *args: Any) -> Any:
        # args: q, k, v, bias, sinks, all of shared in one tuple. Each further argument or result of
        # a Function costs a call about a microsecond, forward and backward.
        inputs = (*args[:3], *args[5])
        o, lse, _, w = output = below_autograd(self.fwd_op, inputs)
        _remember(ctx, ctx.needs_input_grad[:5], inputs, output)
        return (o, lse, w) if inputs[3 + _N_TENSORS + _NUMBER_WEIGHTS] else (o, lse)

    def _slim_backward(
        self, ctx: Any, do: Tensor | None, dlse: Tensor | None, dweights: Tensor | None = None
    ) -> tuple[Any, ...]:
        return (*self._gradients(ctx, do, dlse, dweights), None)

    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, *shared: Any
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """The forward op with autograd: o, lse and, where asked for, the weights."""
        if torch.compiler.is_compiling():
            o, lse, _, w = self.fwd_op(q, k, v, *shared)
            return o, lse, w
        bias, sinks = shared[_BIAS], shared[_SINKS]
        if torch.autograd.forward_ad._current_level >= 0:  # forward mode: the formula has a rule
            o, lse, *weights = _by_formula(q, k, v, Shared(*shared))
            return o, lse, weights[0] if weights else None
        if functorch_active():
            o, lse, _, w = self.functorch_forward.apply(q, k, v, *shared)
            return o, lse, w
        if not torch.is_grad_enabled() or not (
            q.requires_grad
            or k.requires_grad
            or v.requires_grad
            or (bias is not None and bias.requires_grad)
            or (sinks is not None and sinks.requires_grad)
        ):
            o, lse, _, w = below_autograd(self.fwd_op, (q, k, v, *shared))
            return o, lse, w
        o, lse, *weights = self.eager_forward.apply(q, k, v, bias, sinks, shared)
        return o, lse, weights[0] if weights else None

    def backward(self, *args: Any) -> Any:
        if torch.compiler.is_compiling():
            return self.bwd_op(*args)
        if torch.autograd.forward_ad._current_level < 0:
            if functorch_active():
                return self.functorch_backward.apply(*args)
            if not torch.is_grad_enabled():
                return below_autograd(self.bwd_op, args)
        return self.eager_backward.apply(*args)


# The C++ kernels behind the CPU key, and the GPU's, which take ``deterministic`` as well.
forward = _Ops("").forward
forward_triton = _Ops("_triton").forward
forward_cuda = _Ops("_cuda").forward
