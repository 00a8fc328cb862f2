"""The ops as torch sees them: opcheck, compile, export, autocast, vmap, fake tensors."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from tools import FEATURES, Problem, cumulative, fake_grads, featured, on_fake_cuda, packed
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend
from torch._subclasses import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from fastattn import attention, attention_varlen


class _Recorder(TorchDispatchMode):
    """Keeps the arguments of every fastattn op that runs."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: dict[Any, tuple[Any, ...]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "fastattn":
            assert not kwargs, "the ops are called with positional arguments"
            self.calls[func] = tuple(
                a.detach().clone(memory_format=torch.preserve_format)
                if isinstance(a, Tensor)
                else a
                for a in args
            )
        return func(*args, **(kwargs or {}))


def op_calls(problem: Problem) -> dict[str, tuple[Any, tuple[Any, ...]]]:
    """The forward and backward op that a problem runs on the CPU kernels, with their arguments."""
    fn = attention if problem.cu_seqlens is None else attention_varlen
    leaves = problem.leaves()

    def run() -> None:
        outputs = problem.call(fn, leaves, backend="cpu")
        ups = problem.upstream_for(outputs)
        torch.autograd.backward(list(outputs.values()), [ups[n] for n in outputs])

    return op_calls_of(run)


def op_calls_of(run: Callable[[], None]) -> dict[str, tuple[Any, tuple[Any, ...]]]:
    """Every fastattn op that `run` runs, by name, with its last arguments."""
    with _Recorder() as recorder:
        run()
    return {func.name().split("::")[1]: (func, args) for func, args in recorder.calls.items()}


PACKED: dict[str, Callable[[], Problem]] = {
    "packed": lambda: packed((7, 0, 12), (5, 3, 12), h=4, hk=2, d=8, causal=True),
    "packed_all": lambda: packed(
        (7, 12), (5, 12), h=4, hk=2, d=8, bias=torch.randn(1, 4, 1, 12), sinks=torch.randn(4),
        dropout_p=0.3, seed=3, return_weights=True, window=(5, 1),
    ),
}  # fmt: skip


def problem_named(name: str, dtype: torch.dtype = torch.float32) -> Problem:
    if name in PACKED:
        return PACKED[name]()
    return featured(name, b=2, h=4, hk=2, sq=9, sk=13, d=8, dtype=dtype)


@pytest.mark.parametrize("op", ["attention_fwd", "attention_bwd"])
@pytest.mark.parametrize(
    "case", ["plain", "all", "bias", "lens_bottom_right", "weights_mean", *PACKED]
)
def test_opcheck(case: str, op: str) -> None:
    func, args = op_calls(problem_named(case))[op]
    floats = [
        a.requires_grad_(op == "attention_fwd" and i < 3)
        if isinstance(a, Tensor) and a.is_floating_point()
        else a
        for i, a in enumerate(args)
    ]
    result = torch.library.opcheck(func, tuple(floats))
    assert set(result.values()) == {"SUCCESS"}


# --------------------------------------------------------------------------------- fake tensors


@pytest.mark.parametrize("case", [*FEATURES, *PACKED])
def test_fake_cuda_ops_and_their_backward(case: str) -> None:
    """The ops' fakes: same shapes, dtypes, strides as the CPU kernels give, all on the device."""
    calls = op_calls(problem_named(case))
    for func, args in calls.values():
        real = func(*args)
        with FakeTensorMode():
            faked = func(*(on_fake_cuda(a) for a in args))
            for r, f in zip(real, faked, strict=True):
                assert f.device.type == "cuda"
                assert (f.shape, f.dtype) == (r.shape, r.dtype)
                assert r.numel() == 0 or f.stride() == r.stride()
    func, args = calls["attention_fwd"]
    with FakeTensorMode():
        fakes = [on_fake_cuda(a) for a in args]
        leaves = [x.requires_grad_() for x in fakes[:3]]
        o, lse, *_ = func(*fakes)
        for grad, leaf in zip(fake_grads([o, lse], leaves), leaves, strict=True):
            assert grad is not None
            assert (grad.shape, grad.dtype, grad.device) == (leaf.shape, leaf.dtype, leaf.device)


@pytest.mark.filterwarnings("ignore::fastattn.backends.PerformanceWarning")
@pytest.mark.parametrize("case", [*FEATURES, *PACKED])
def test_fake_cuda_public_functions(case: str) -> None:
    """No hidden .item(), no CPU tensor among the CUDA ones, forward and backward."""
    problem = problem_named(case)
    longest = {"max_seqlen_q": 12, "max_seqlen_k": 12} if problem.cu_seqlens is not None else {}
    tensors = problem.leaves()
    with FakeTensorMode():
        leaves = {n: on_fake_cuda(x).requires_grad_() for n, x in tensors.items()}
        given = {
            n: on_fake_cuda(x) for n, x in problem.kwargs.items() if n not in ("bias", "sinks")
        }
        cu = [on_fake_cuda(x) for x in problem.cu_seqlens or ()]
        fn = attention_varlen if cu else attention
        qkv, rest = list(leaves.values())[:3], dict(list(leaves.items())[3:])
        out = fn(*qkv, *cu, **given, **rest, **longest, return_lse=True)
        assert all(x.device.type == "cuda" for x in out)
        assert out[0].shape == (*problem.q.shape[:-1], problem.v.shape[-1])
        for grad, leaf in zip(fake_grads(out, list(leaves.values())), leaves.values(), strict=True):
            assert grad is not None
            assert (grad.shape, grad.dtype, grad.device) == (leaf.shape, leaf.dtype, leaf.device)


# -------------------------------------------------------------------------------------- compile


def compiled(fn: Callable, backend: str = "aot_eager", **options: Any) -> tuple[Callable, Any]:
    torch._dynamo.reset()
    counter = CompileCounterWithBackend(backend)
    return torch.compile(fn, backend=counter, fullgraph=True, **options), counter


def same_as_eager(
    fn: Callable, fast: Callable, make: Callable[[int], list[Tensor]], n: int
) -> None:
    """Values and gradients of `fast` against `fn` on fresh inputs of size n."""
    results = []
    torch.manual_seed(n)
    inputs = make(n)
    for f in (fn, fast):
        leaves = [
            x.detach().clone().requires_grad_() if x.is_floating_point() else x for x in inputs
        ]
        torch.manual_seed(1)
        out = f(*leaves)
        out = out if isinstance(out, tuple) else (out,)
        wanted = [x for x in leaves if x.requires_grad]
        grads = torch.autograd.grad([x.square().sum() for x in out], wanted)
        results.append((*out, *grads))
    for got, want in zip(results[1], results[0], strict=True):
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)


def qkv(n: int, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    return [
        torch.randn(2, 4, n, 8, dtype=dtype),
        torch.randn(2, 2, n + 3, 8, dtype=dtype),
        torch.randn(2, 2, n + 3, 8, dtype=dtype),
    ]


COMPILED: dict[str, tuple[Callable, Callable[[int], list[Tensor]]]] = {
    "plain": (lambda q, k, v: attention(q, k, v), qkv),
    "causal_window": (
        lambda q, k, v: attention(q, k, v, causal="bottom_right", window=(5, None)), qkv,
    ),
    "lse_weights": (
        lambda q, k, v: attention(q * 2, k, v, return_lse=True, return_weights=True), qkv,
    ),
    "mask_made_inside": (
        lambda q, k, v: attention(
            q, k, v, mask=torch.arange(k.shape[2]) % 2 == 0, scale=q.shape[-1] ** -0.25
        ), qkv,
    ),
    "bias_sinks": (
        lambda q, k, v, b, s: attention(q, k, v, bias=b, sinks=s, softcap=4.0),
        lambda n: [*qkv(n), torch.randn(4, 1, n + 3), torch.randn(4)],
    ),
    "lengths": (
        lambda q, k, v, n: attention(q, k, v, k_lens=n),
        lambda n: [*qkv(n), torch.tensor([n + 3, n // 2])],
    ),
    "dropout_seeded": (lambda q, k, v: attention(q, k, v, dropout_p=0.5, seed=3), qkv),
    "reference_fp64": (
        lambda q, k, v: attention(q, k, v, causal=True), lambda n: qkv(n, torch.float64),
    ),
    "packed": (
        lambda q, k, v, cu: attention_varlen(q, k, v, cu, cu, causal=True),
        lambda n: [*(torch.randn(3 * n, 2, 8) for _ in range(3)), cumulative((n, 0, 2 * n))],
    ),
    "packed_bias": (
        lambda q, k, v, cu, b: attention_varlen(
            q, k, v, cu, cu, bias=b, max_seqlen_q=b.shape[1], max_seqlen_k=b.shape[2]
        ),
        lambda n: [
            *(torch.randn(3 * n, 2, 8) for _ in range(3)), cumulative((n, 0, 2 * n)),
            torch.randn(2, 2 * n, 2 * n),
        ],
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", COMPILED)
def test_compile_full_graph_with_dynamic_shapes(case: str) -> None:
    """One graph for every length, no break, and eager's values and gradients."""
    fn, make = COMPILED[case]
    fast, counter = compiled(fn, dynamic=True)
    same_as_eager(fn, fast, make, 6)
    graphs = counter.frame_count
    for n in (10, 17, 40):
        same_as_eager(fn, fast, make, n)
    assert counter.frame_count == graphs


def test_compile_with_inductor() -> None:
    fn = lambda q, k, v: attention(q.sin(), k, v, causal=True).cos()  # noqa: E731
    torch._dynamo.reset()
    fast = torch.compile(fn, fullgraph=True)
    for n in (8, 19, 33):
        same_as_eager(fn, fast, qkv, n)


def test_compiled_dropout_is_no_frozen_seed() -> None:
    """seed=None draws at run time: two calls of one graph differ, one generator state repeats."""
    fast, counter = compiled(lambda q: attention(q, q, q, dropout_p=0.5))
    q = torch.randn(1, 2, 16, 8)
    torch.manual_seed(4)
    first = fast(q)
    graphs = counter.frame_count
    second = fast(q)
    torch.manual_seed(4)
    assert torch.equal(fast(q), first)
    assert not torch.equal(first, second)
    assert counter.frame_count == graphs


def test_compiled_int_seed_does_not_recompile() -> None:
    fn = lambda q, seed: attention(q, q, q, dropout_p=0.5, seed=seed)  # noqa: E731
    fast, counter = compiled(fn)
    q = torch.randn(1, 2, 16, 8)
    graphs = []
    for seed in (3, 4, 5, 6, 7):
        torch.testing.assert_close(fast(q, seed), fn(q, seed))
        graphs.append(counter.frame_count)
    assert graphs[1] == graphs[-1]  # static at first, then one dynamic graph


def test_compile_checks_shapes_too() -> None:
    fast, _ = compiled(lambda q, k: attention(q, k, k))
    with pytest.raises(Exception, match="head_dim 8"):
        fast(torch.randn(1, 2, 4, 8), torch.randn(1, 2, 4, 9))


# ------------------------------------------------------------------------------------------ export


class Attend(torch.nn.Module):
    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return attention(q, k, v, causal="bottom_right")


class AttendPacked(torch.nn.Module):
    def forward(self, q: Tensor, cu: Tensor) -> Tensor:
        return attention_varlen(q, q, q, cu, cu, causal=True)


@pytest.mark.parametrize("strict", [False, True])
def test_export_with_dynamic_shapes(strict: bool) -> None:
    b, m, n = (torch.export.Dim(name, min=2, max=4096) for name in ("b", "m", "n"))
    shapes = {"q": {0: b, 2: m}, "k": {0: b, 2: n}, "v": {0: b, 2: n}}
    exported = torch.export.export(Attend(), tuple(qkv(6)), dynamic_shapes=shapes, strict=strict)
    targets = {str(node.target) for node in exported.graph.nodes}
    assert "fastattn.attention_fwd.default" in targets
    for batch, length in ((2, 9), (5, 30)):
        q, k, v = (x[:1].expand(batch, -1, -1, -1) for x in qkv(length))
        torch.testing.assert_close(exported.module()(q, k, v), Attend()(q, k, v))


def test_export_packed() -> None:
    t = torch.export.Dim("t", min=2, max=4096)
    args = (torch.randn(9, 2, 8), cumulative((4, 5)))
    exported = torch.export.export(AttendPacked(), args, dynamic_shapes=({0: t}, None))
    q, cu = torch.randn(20, 2, 8), cumulative((20, 0))
    torch.testing.assert_close(exported.module()(q, cu), AttendPacked()(q, cu))


# ------------------------------------------------------------------------------ autocast and others


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast(dtype: torch.dtype) -> None:
    q, k, v = (torch.randn(1, 2, 20, 16, requires_grad=True) for _ in range(3))
    bias = torch.randn(2, 1, 20, requires_grad=True)
    with torch.autocast("cpu", dtype):
        o, lse = attention(q, k, v, bias=bias, return_lse=True)
    assert (o.dtype, lse.dtype) == (dtype, torch.float32)
    want = attention(q.to(dtype), k.to(dtype), v.to(dtype), bias=bias)
    assert torch.equal(o, want)
    for x, grad in zip((q, k, v, bias), torch.autograd.grad(o.sum(), (q, k, v, bias)), strict=True):
        assert grad.dtype == x.dtype == torch.float32
        assert grad.count_nonzero() > 0


def test_autocast_of_mixed_dtypes_and_of_float64() -> None:
    """A projection's bf16 q beside a cached fp32 k: autocast makes them one. float64 stays."""
    q, k = torch.randn(1, 2, 20, 16).bfloat16(), torch.randn(1, 2, 20, 16)
    doubles = k.double()
    with torch.autocast("cpu", torch.bfloat16):
        assert attention(q, k, k).dtype == torch.bfloat16
        assert attention(doubles, doubles, doubles).dtype == torch.float64
    with torch.autocast("cpu", torch.bfloat16, enabled=False), pytest.raises(TypeError, match="k"):
        attention(q, k, k)


def test_autocast_packed() -> None:
    q = torch.randn(9, 2, 8, requires_grad=True)
    cu = cumulative((4, 5))
    with torch.autocast("cpu", torch.bfloat16):
        o = attention_varlen(q, q, q, cu, cu)
    assert o.dtype == torch.bfloat16
    assert torch.autograd.grad(o.sum(), q)[0].dtype == torch.float32


VMAPPED: dict[str, tuple[Callable, tuple[Any, ...]]] = {
    "all_three": (lambda q, k, v: attention(q, k, v, causal=True), (0, 0, 0)),
    "q_alone": (lambda q, k, v: attention(q, k[0], v[0]), (0, None, None)),
    "kv_alone": (lambda q, k, v: attention(q[0], k, v), (None, 0, 0)),
    "lse": (lambda q, k, v: attention(q, k, v, return_lse=True)[1], (0, 0, 0)),
    "weights": (lambda q, k, v: attention(q, k, v, return_weights=True)[1], (0, 0, 0)),
    "dropout": (lambda q, k, v: attention(q, k, v, dropout_p=0.5, seed=2), (0, 0, 0)),
    "mask": (
        lambda q, k, v: attention(q, k, v, mask=torch.arange(9) % 2 == 0, softcap=2.0), (0, 0, 0),
    ),
}  # fmt: skip


@pytest.mark.parametrize("backend", ["auto", "reference"])
@pytest.mark.parametrize("case", VMAPPED)
def test_vmap(case: str, backend: str) -> None:
    fn, dims = VMAPPED[case]
    q, k, v = torch.randn(3, 2, 4, 7, 8), torch.randn(3, 2, 2, 9, 8), torch.randn(3, 2, 2, 9, 8)
    dtype = torch.float64 if backend == "reference" else torch.float32
    q, k, v = (x.to(dtype) for x in (q, k, v))
    got = torch.vmap(fn, in_dims=dims)(q, k, v)
    picked = [
        [x if d is None else x[i] for x, d in zip((q, k, v), dims, strict=True)] for i in range(3)
    ]
    torch.testing.assert_close(got, torch.stack([fn(*xs) for xs in picked]))


def test_vmap_over_other_dims_and_arguments() -> None:
    q = torch.randn(2, 4, 7, 5, 8)
    got = torch.vmap(lambda x: attention(x, x, x), in_dims=3, out_dims=2)(q)
    want = torch.stack([attention(*(q[:, :, :, i],) * 3) for i in range(5)], dim=2)
    torch.testing.assert_close(got, want)
    bias, lens = torch.randn(5, 7), torch.tensor([[7, 3], [1, 0], [7, 7], [2, 5], [4, 4]])
    x = q[:, :, :, 0]
    fn = lambda b, n: attention(x, x, x, bias=b, k_lens=n)  # noqa: E731
    got = torch.vmap(fn)(bias, lens)
    torch.testing.assert_close(
        got, torch.stack([fn(b, n) for b, n in zip(bias, lens, strict=True)])
    )


def test_vmap_nested() -> None:
    q = torch.randn(2, 3, 1, 2, 7, 8)
    fn = lambda x: attention(x, x, x, causal=True)  # noqa: E731
    want = torch.stack([torch.stack([fn(x) for x in row]) for row in q])
    torch.testing.assert_close(torch.vmap(torch.vmap(fn))(q), want)


GIVEN = {"plain": {}, "causal": {"causal": True}, "sinks": {"sinks": torch.ones(4)}}


@pytest.mark.parametrize("case", GIVEN)
def test_batched_upstream_gradients(case: str) -> None:
    """vmap over the backward op alone, as vectorised Jacobians do."""
    q, k = torch.randn(2, 4, 7, 8), torch.randn(2, 2, 9, 8)
    leaves = [x.requires_grad_() for x in (q, k)]
    o = attention(q, k, k, **GIVEN[case])
    do = torch.randn(5, *o.shape)
    got = torch.autograd.grad(o, leaves, do, is_grads_batched=True, retain_graph=True)
    for i in range(5):
        want = torch.autograd.grad(o, leaves, do[i], retain_graph=True)
        for g, w in zip(got, want, strict=True):
            torch.testing.assert_close(g[i], w)


@pytest.mark.parametrize("case", GIVEN)
def test_per_sample_gradients(case: str) -> None:
    """vmap over grad, as torch.func makes per-sample gradients."""
    given = GIVEN[case]
    q, k = torch.randn(3, 2, 4, 7, 8), torch.randn(3, 2, 2, 9, 8)

    def loss(q: Tensor, k: Tensor) -> Tensor:
        return attention(q, k, k, **given).square().sum()

    got = torch.vmap(torch.func.grad(loss, argnums=(0, 1)))(q, k)
    for i in range(3):
        leaves = [x[i].clone().requires_grad_() for x in (q, k)]
        for g, w in zip(got, torch.autograd.grad(loss(*leaves), leaves), strict=True):
            torch.testing.assert_close(g[i], w)


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing_repeats_the_dropout(reentrant: bool) -> None:
    grads = []
    for use in (False, True):
        torch.manual_seed(5)
        q = torch.ones(1, 2, 20, 8).cumsum(2).sin().requires_grad_()
        fn = lambda x: attention(x, x, x, dropout_p=0.5)  # noqa: E731
        o = checkpoint(fn, q, use_reentrant=reentrant) if use else fn(q)
        o.square().sum().backward()
        grads.append(q.grad)
    assert torch.equal(*grads)


def test_inference_mode() -> None:
    q = torch.randn(1, 2, 20, 8)
    with torch.inference_mode():
        o = attention(q, q, q, causal=True)
        packed_o = attention_varlen(*(q[0].transpose(0, 1),) * 3, *(cumulative((20,)),) * 2)
    assert o.is_inference()
    assert packed_o.shape == (20, 2, 8)
