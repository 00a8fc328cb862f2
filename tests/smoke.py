"""A smoke test of an installed wheel, away from the checkout: `python smoke.py` ends in PASS.

Needs torch and fastattn alone (no pytest), so that it runs in the barest environment. What it looks
at is what may break when the wheel meets another torch: loading, dispatch, autograd, opcheck,
torch.compile. The values are compared with `fastattn.reference` in fp64.
"""

import argparse
import sys
from pathlib import Path

import torch
from torch import Tensor

import fastattn
from fastattn import reference
from fastattn.backends import cpu_isa, cpu_isas, force_cpu_isa

# Relative distance to the fp64 oracle: a few roundings of the inputs' type.
TOLERANCE = {torch.float32: 2e-5, torch.bfloat16: 2e-2, torch.float16: 3e-3}


def distance(got: Tensor, want: Tensor) -> float:
    return float((got.double() - want).norm() / want.norm())


def inputs(dtype: torch.dtype) -> list[Tensor]:
    gen = torch.Generator().manual_seed(0)
    shapes = ((2, 4, 67, 48), (2, 2, 83, 48), (2, 2, 83, 48))
    return [torch.randn(s, generator=gen).to(dtype).requires_grad_() for s in shapes]


def values(dtype: torch.dtype) -> str:
    """Forward and backward, causal, grouped heads, a bias with a gradient."""
    leaves = inputs(dtype)
    leaves.append(torch.randn(1, 4, 67, 83).to(dtype).requires_grad_())
    exact = [t.detach().double().requires_grad_() for t in leaves]

    def call(fn: object, ts: list[Tensor], **kwargs: object) -> list[Tensor]:
        q, k, v, bias = ts
        o = fn(q, k, v, bias=bias, causal="bottom_right", **kwargs)  # type: ignore[operator]
        do = torch.linspace(-1, 1, o.numel(), dtype=torch.float64).view_as(o)
        return [o, *torch.autograd.grad(o, ts, do.to(o.dtype))]

    want = call(reference.attention, exact)
    worst = 0.0
    for isa in cpu_isas():
        with force_cpu_isa(isa):
            got = call(fastattn.attention, leaves, backend="cpu")
        for name, a, b in zip(("o", "dq", "dk", "dv", "dbias"), got, want, strict=True):
            error = distance(a, b)
            worst = max(worst, error)
            assert error < TOLERANCE[dtype], f"{dtype} {isa} {name}: {error:.1e} from the oracle"
    return f"{worst:.1e} from the oracle on {', '.join(cpu_isas())}"


def packed() -> str:
    q, k, v = (torch.randn(10, 2, 32) for _ in range(3))
    cu = torch.tensor([0, 3, 3, 10], dtype=torch.int32)
    o = fastattn.attention_varlen(q, k, v, cu, cu)
    parts = [
        fastattn.attention(*(t[a:b].transpose(0, 1)[None] for t in (q, k, v)))[0].transpose(0, 1)
        for a, b in ((0, 3), (3, 10))
    ]
    torch.testing.assert_close(o, torch.cat(parts))
    return "packed equals padded"


def compiled() -> str:
    """Inductor around the op, forward and backward; the eager result is the oracle here."""
    q, k, v = inputs(torch.float32)

    def fn(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return fastattn.attention(q * 1.5, k, v, causal=True).relu()

    want = torch.autograd.grad(fn(q, k, v).sum(), (q, k, v))
    got = torch.autograd.grad(torch.compile(fn, fullgraph=True)(q, k, v).sum(), (q, k, v))
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b)
    return "fullgraph"


def checked() -> str:
    """opcheck of the operators as the public call uses them, recorded on the way."""
    from torch.utils._python_dispatch import TorchDispatchMode

    calls: list[tuple[object, tuple[object, ...], dict[str, object]]] = []

    class Record(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
            if func.namespace == "fastattn":
                calls.append((func, args, kwargs or {}))
            return func(*args, **(kwargs or {}))

    leaves = inputs(torch.float32)
    with Record():
        fastattn.attention(*leaves, causal=True).sum().backward()
    assert calls, "no fastattn operator was called"
    names = []
    for func, args, kwargs in calls:
        train = "fwd" in str(func)  # q, k, v are the first three
        clean = tuple(
            a.detach().requires_grad_(train and i < 3) if isinstance(a, Tensor) else a
            for i, a in enumerate(args)
        )
        torch.library.opcheck(func, clean, kwargs)  # type: ignore[arg-type]
        names.append(str(func))
    return ", ".join(sorted(set(names)))


def cuda_kernels(wanted: bool) -> str:
    """Whether _C_cuda has registered its kernels, and what is said of them; runs none."""
    has = torch._C._dispatch_has_kernel_for_dispatch_key
    found = has("fastattn::attention_cuda_kernel_fwd", "CUDA")
    assert found == wanted, f"the CUDA kernels are {'' if found else 'not '}registered"
    (info,) = (b for b in fastattn.backends() if b.name == "cuda")
    return f"{'registered' if found else 'not there'}: {info.why}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--no-compile", action="store_true", help="no C++ compiler here")
    parser.add_argument("--not-under", type=Path, help="fail if fastattn comes from this folder")
    parser.add_argument("--cuda-kernels", choices=("yes", "no"), help="fail if it is not so")
    args = parser.parse_args()
    home = Path(fastattn.__file__).resolve().parent
    if args.not_under and args.not_under.resolve() in home.parents:
        sys.exit(f"fastattn was imported from the checkout: {home}")
    torch.manual_seed(0)
    print(f"torch {torch.__version__}, Python {sys.version.split()[0]}, isa {cpu_isa()}, {home}")
    steps = [(str(d), lambda d=d: values(d)) for d in TOLERANCE]
    steps += [("packed", packed), ("opcheck", checked)]
    if args.cuda_kernels:
        steps.append(("cuda kernels", lambda: cuda_kernels(args.cuda_kernels == "yes")))
    if not args.no_compile:
        steps.append(("compile", compiled))
    for name, step in steps:
        print(f"  {name:16} {step()}", flush=True)
    print("PASS")


if __name__ == "__main__":
    main()
