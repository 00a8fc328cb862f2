"""A small fixed attention call with the features of a given one, and its comparison with the
reference: what `fastattn.first_use` runs before a GPU kernel's first call on a machine."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastattn import reference
from fastattn.ops._eager import recording
from fastattn.ops.attention_op import Shared

# Several tiles of every configuration, with a partial one; two heads of a group.
_B, _SQ, _SK = 2, 150, 170
# Gradients in the order of their bits in `need`.
_NAMES = ("dq", "dk", "dv", "dbias", "dsinks")


def variant(q: Tensor, v: Tensor, group: int, shared: Shared, more: str = "") -> str:
    """What tells one set of compiled kernels from another, in words."""
    given = {
        "mask": shared.mask,
        "lens": shared.q_lens if shared.q_lens is not None else shared.k_lens,
        "packed": shared.cu_seqlens_q,
        "alibi": shared.alibi_slopes,
        "sinks": shared.sinks,
        "gqa": group > 1 or None,
        "window": (shared.window_left >= 0 or shared.window_right >= 0) or None,
        "softcap": shared.softcap or None,
        "dropout": shared.dropout_p or None,
        "weights": shared.weights or None,
        "causal": shared.causal or None,
    }
    words = [name for name, x in given.items() if x is not None]
    if shared.bias is not None:  # its shape decides who owns which sum of its gradient
        full = "bhij"[4 - shared.bias.dim() :]
        letters = ("1" if n == 1 else x for n, x in zip(shared.bias.shape, full, strict=True))
        words.append(f"bias[{''.join(letters)}] {str(shared.bias.dtype)[6:]}")
    head_dim = f"{q.shape[-1]}" if q.shape[-1] == v.shape[-1] else f"{q.shape[-1]}/{v.shape[-1]}"
    return " ".join([str(q.dtype)[6:], f"D{head_dim}", *words, *([more] if more else [])])


class SmallCall:
    """Inputs on q's device, the same for every run."""

    def __init__(self, q: Tensor, k: Tensor, v: Tensor, shared: Shared) -> None:
        gen = torch.Generator().manual_seed(1)
        device, dtype = q.device, q.dtype

        def randn(*shape: int) -> Tensor:
            return torch.randn(shape, generator=gen).to(device, dtype)

        group = 2 if q.shape[1] != k.shape[1] else 1
        heads, D, Dv = 2 * group, q.shape[-1], v.shape[-1]
        self.packed = shared.cu_seqlens_q is not None
        if self.packed:
            self.qkv = randn(_SQ, heads, D), randn(_SK, 2, D), randn(_SK, 2, Dv)
            sq, sk = 3 * _SQ // 5, 4 * _SK // 5
        else:
            self.qkv = randn(_B, heads, _SQ, D), randn(_B, 2, _SK, D), randn(_B, 2, _SK, Dv)
            sq, sk = _SQ, _SK

        def broadcast(x: Tensor) -> tuple[int, ...]:
            full = (_B, heads, sq, sk)[4 - x.dim() :]
            return tuple(1 if n == 1 else m for n, m in zip(x.shape, full, strict=True))

        def ints(x: Tensor | None, *values: int) -> Tensor | None:
            return None if x is None else torch.tensor(values, dtype=x.dtype, device=device)

        def floats(x: Tensor | None, shape: tuple[int, ...]) -> Tensor | None:
            if x is None:
                return None
            return torch.randn(shape, generator=gen).to(device, x.dtype)

        mask = None
        if shared.mask is not None:
            mask = (torch.rand(broadcast(shared.mask), generator=gen) > 0.3).to(device)
        slopes = shared.alibi_slopes
        self.shared = Shared(
            mask=mask,
            bias=None if shared.bias is None else floats(shared.bias, broadcast(shared.bias)),
            q_lens=ints(shared.q_lens, 2 * _SQ // 3, _SQ),
            k_lens=ints(shared.k_lens, _SK, _SK // 2),
            cu_seqlens_q=ints(shared.cu_seqlens_q, 0, sq, _SQ - 5),
            cu_seqlens_k=ints(shared.cu_seqlens_k, 0, _SK - sk, _SK),
            alibi_slopes=None
            if slopes is None
            else torch.rand((*(_B,) * (slopes.dim() - 1), heads), generator=gen).to(slopes),
            sinks=floats(shared.sinks, (heads,)),
            seed=ints(shared.seed, 12345),
            scale=D**-0.5,
            causal=shared.causal,
            window_left=_SK // 4 if shared.window_left >= 0 else -1,
            window_right=_SK // 5 if shared.window_right >= 0 else -1,
            softcap=5.0 if shared.softcap else 0.0,
            dropout_p=0.25 if shared.dropout_p else 0.0,
            weights=shared.weights,
            max_seqlen_q=sq,
            max_seqlen_k=sk,
        )
        self.gen = gen

    def arguments(self) -> tuple[Any, ...]:
        """q, k, v and the shared arguments, in the schema's order."""
        return (*self.qkv, *(getattr(self.shared, n) for n in Shared.__slots__))

    def by_reference(self, dtype: torch.dtype, grads: dict[str, Tensor]) -> dict[str, Tensor]:
        """Outputs, and gradients for the upstream ``grads``, on the CPU."""

        def host(x: Any) -> Any:
            if not isinstance(x, Tensor):
                return x
            x = x.cpu()
            return x.to(dtype) if x.is_floating_point() else x

        with recording():
            return self._by_reference(host, grads)

    def _by_reference(self, host: Any, grads: dict[str, Tensor]) -> dict[str, Tensor]:
        leaves = [host(x).requires_grad_() for x in self.qkv]
        shared = Shared(*(host(getattr(self.shared, n)) for n in Shared.__slots__))
        if shared.alibi_slopes is not None:
            shared.alibi_slopes = shared.alibi_slopes.detach()
        for name in ("bias", "sinks"):
            x = getattr(shared, name)
            leaves.append(x.requires_grad_() if x is not None else None)
        fn: Any = reference.attention
        args: list[Any] = leaves[:3]
        if self.packed:
            fn = reference.attention_varlen
            args += [shared.cu_seqlens_q, shared.cu_seqlens_k]
        found = fn(*args, **shared.reference_kwargs())
        outputs = dict(zip(("o", "lse", "weights"), found, strict=False))
        result = {n: x.detach() for n, x in outputs.items()}
        if grads:
            there = [x for x in leaves if x is not None]
            given = torch.autograd.grad(
                [outputs[n] for n in grads], there,
                [host(g).to(outputs[n].dtype) for n, g in grads.items()], allow_unused=True,
            )  # fmt: skip
            values = iter(given)
            for name, leaf in zip(_NAMES, leaves, strict=True):
                g = next(values) if leaf is not None else None
                if g is not None:
                    result[name] = g
        return result


def _wrong(found: dict[str, Tensor], right: dict[str, Tensor], plain: dict[str, Tensor]) -> str:
    """What differs by more than four times the rounding of plain PyTorch in the same dtype; ''."""
    complaints = []
    for name, x in found.items():
        r = right[name]
        got, low = x.detach().cpu().double(), plain[name].double()
        finite = r.isfinite()
        if not torch.equal(got.isfinite(), finite):
            complaints.append(f"{name} is not finite where it should be, or the reverse")
            continue
        size = r[finite].norm() + 1e-30
        error = float((got - r)[finite].norm() / size)
        allowed = 4 * float((low - r)[finite].norm() / size) + 1e-6
        if not error <= allowed:
            complaints.append(f"{name} is off by {error:.1e}, {allowed:.1e} allowed")
    return "; ".join(complaints)


def check_forward(forward: Any, q: Tensor, k: Tensor, v: Tensor, shared: Shared) -> str | None:
    """Run ``forward`` (a backend's, with the op's arguments) on a small call; what is wrong, or
    None."""
    small = SmallCall(q, k, v, shared)
    o, lse, _, w = forward(*small.arguments())
    found = {"o": o, "lse": lse} | ({"weights": w} if shared.weights else {})
    right, plain = (small.by_reference(dtype, {}) for dtype in (torch.float64, q.dtype))
    return _wrong(found, right, plain) or None


def check_backward(
    forward: Any,
    backward: Any,
    upstream: tuple[bool, ...],
    q: Tensor,
    k: Tensor,
    v: Tensor,
    shared: Shared,
    need: int,
    deterministic: bool,
) -> str | None:
    """The same for ``backward``, on the forward's own results; upstream: whether o, lse, weights
    get a gradient."""
    small = SmallCall(q, k, v, shared)
    o, lse, lse_lo, w = forward(*small.arguments())
    grads = {
        name: torch.randn(x.shape, generator=small.gen).to(x)
        for name, x, there in zip(("o", "lse", "weights"), (o, lse, w), upstream, strict=True)
        if there
    }
    if "lse" in grads:  # what autograd hands over for a row without keys has no meaning
        grads["lse"] = grads["lse"].masked_fill(~lse.isfinite(), 0.0)
    results = backward(
        grads.get("o"), grads.get("lse"), grads.get("weights"), *small.qkv,
        o if "o" in grads else None, lse, lse_lo, *small.arguments()[3:], need=need,
        deterministic=deterministic,
    )  # fmt: skip
    right, plain = (small.by_reference(dtype, grads) for dtype in (torch.float64, q.dtype))
    found = {
        name: x
        for i, (name, x) in enumerate(zip(_NAMES, results, strict=True))
        if need >> i & 1 and name in right
    }
    return _wrong(found, right, plain) or None
