"""Launches as the launchers of fastattn.kernels make them: recorded, or taken over.

A `Launch` is what `fastattn.kernels.launch.hook` was given. `taken` installs a hook and puts the
former one back. Everything below works on plain CPU tensors.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, make_backend
from triton.runtime.jit import create_function_from_signature

from fastattn.kernels import launch as launching


@dataclass(frozen=True)
class Launch:
    kernel: Any  # triton.runtime.jit.JITFunction
    grid: tuple[int, ...]
    args: tuple[Any, ...]
    meta: dict[str, Any]

    @property
    def name(self) -> str:
        return str(self.kernel.__name__)

    @property
    def bound(self) -> dict[str, Any]:
        """Every parameter of the kernel by name."""
        names = self.kernel.arg_names
        bound = {p.name: p.default for p in self.kernel.params if p.has_default}
        bound |= dict(zip(names, self.args, strict=False))
        return bound | {n: self.meta[n] for n in names if n in self.meta}


@dataclass(frozen=True)
class Specialised:
    """What Triton's JIT hands to its compiler for a launch on a target."""

    source: ASTSource
    options: Any
    key: str  # equal keys: the same compiled kernel


def target(arch: int | str) -> GPUTarget:
    """80 or "sm_80", or "gfx942"."""
    if isinstance(arch, str) and arch.startswith("gfx"):
        return GPUTarget("hip", arch, 64)
    return GPUTarget("cuda", int(str(arch).removeprefix("sm_")), 32)


def specialise(launch: Launch, to: GPUTarget) -> Specialised:
    """Signature, constants and attributes (divisible by 16, equal to 1) as `kernel[grid]` would."""
    kernel, backend = launch.kernel, make_backend(to)
    binder = create_function_from_signature(kernel.signature, kernel.params, backend)
    # The two keywords that JITFunction.run adds.
    given = {**launch.meta, "debug": bool(kernel.debug), "instrumentation_mode": ""}
    bound, specialization, options = binder(*launch.args, **given)
    options, signature, constexprs, attrs = kernel._pack_args(
        backend, given, bound, specialization, options
    )
    source = ASTSource(kernel, signature, constexprs, attrs)
    key = f"{kernel.cache_key} {specialization} {sorted(options.__dict__.items())}"
    return Specialised(source, options, key)


@contextmanager
def taken(hook: Callable[[Launch], bool]) -> Iterator[None]:
    """While open, `hook` sees every launch; it returns whether it has run the kernel itself."""
    former = launching.hook
    launching.hook = lambda kernel, grid, args, meta: hook(Launch(kernel, grid, args, dict(meta)))
    try:
        yield
    finally:
        launching.hook = former


@contextmanager
def recorded(run: bool = False) -> Iterator[list[Launch]]:
    """Every launch of the block, in order; none runs (what it would write stays unwritten)."""
    launches: list[Launch] = []

    def hook(launch: Launch) -> bool:
        launches.append(launch)
        return not run

    with taken(hook):
        yield launches


@contextmanager
def unwritten_is_nan() -> Iterator[None]:
    """torch.empty and its kin hold NaN (integers their largest value) while this is open."""
    strict = torch.are_deterministic_algorithms_enabled()
    warn = torch.is_deterministic_algorithms_warn_only_enabled()
    fill = torch.utils.deterministic.fill_uninitialized_memory  # type: ignore[attr-defined]
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True  # type: ignore[attr-defined]
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(strict, warn_only=warn)
        torch.utils.deterministic.fill_uninitialized_memory = fill  # type: ignore[attr-defined]
