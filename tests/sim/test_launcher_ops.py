"""The CUDA backend as it is called: choice, refusals, errors of launches, first use, autograd,
compilers, modules. Kernels run in the PTX simulator, on shapes of one tile."""

import importlib
import warnings
from typing import Any

import pytest
import torch
from test_attention_ops import PACKED, on_fake_cuda, op_calls, problem_named
from tools import fake_grads, packed, padded
from torch import Tensor
from torch._subclasses import FakeTensorMode

import fastattn
from fastattn import first_use, reference
from fastattn.backends import PerformanceWarning, select
from fastattn.ops import attention_cuda, attention_first_use, attention_guard
from fastattn.ops import attention_op as op
from fastattn.ops.attention_op import Shared
from sim import operators
from sim.cudart import Device

backends = importlib.import_module("fastattn.backends")
OPS = torch.ops.fastattn


def qkv(*shape: int, **more: Any) -> tuple[Tensor, Tensor, Tensor]:
    q, k, v = (torch.randn(shape or (1, 2, 9, 8), **more) for _ in range(3))
    return q, k, v


def arguments(*qkv: Tensor, **given: Any) -> tuple[Any, ...]:
    """Of attention_cuda_fwd: q, k, v and the shared arguments in the schema's order."""
    values: dict[str, Any] = dict.fromkeys(Shared.__slots__[:9])
    values |= {"scale": 0.25, "causal": 0, "window_left": -1, "window_right": -1, "softcap": 0.0}
    values |= {"dropout_p": 0.0, "weights": 0, "max_seqlen_q": 9, "max_seqlen_k": 9}
    values |= {"deterministic": True} | given
    assert list(values) == list(Shared.__slots__)
    return (*qkv, *values.values())


def refuses(message: str, *args: Any) -> None:
    with pytest.raises(RuntimeError, match=message):
        OPS.attention_cuda_fwd(*args)


# ---------------------------------------------------------------------------------- choice


def test_without_the_stand_in_the_cpu_is_refused() -> None:
    operators.device()  # loaded, and yet
    q = torch.randn(1, 1, 4, 8)
    with pytest.raises(ValueError, match=r"fastattn::attention: backend='cuda'.*CUDA tensors"):
        fastattn.attention(q, q, q, backend="cuda")
    with pytest.raises(ValueError, match="CUDA tensors"):
        OPS.attention_cuda_fwd(*arguments(q, q, q))
    with pytest.raises(ValueError, match="CUDA tensors"):
        lse = torch.zeros(1, 1, 4)
        OPS.attention_cuda_bwd(q, None, None, q, q, q, q, lse, lse, *arguments()[0:], 7)


def test_auto_leaves_cpu_tensors_to_the_cpu(gpu: Device) -> None:
    fastattn.attention(*qkv())
    assert not gpu.launches
    row = {b.name: b for b in fastattn.backends()}["cuda"]
    assert row.usable
    assert "simulator" in row.why


def test_what_it_cannot_serve_is_named(gpu: Device) -> None:
    q = torch.randn(1, 1, 4, 257)
    with pytest.raises(ValueError, match="head_dim up to 256, got 257"):
        fastattn.attention(q, q, q, backend="cuda")
    with pytest.raises(ValueError, match="float32, bfloat16 and float16, got q.dtype"):
        fastattn.attention(*(q[..., :8].double(),) * 3, backend="cuda")
    assert not gpu.launches


@pytest.fixture
def pretend_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine with an sm_80, as far as choosing a backend goes."""
    monkeypatch.setattr(backends, "_C_CUDA_ERROR", "")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: (8, 0))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda *_: "A Name")
    monkeypatch.setattr(backends, "_chosen", {})


@pytest.mark.usefixtures("pretend_gpu")
def test_the_order_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    f32 = torch.float32
    rows = {b.name: b for b in fastattn.backends()}
    assert rows["cuda"].usable
    assert rows["cuda"].details == {"device": "A Name"}
    assert select("attention", "auto", "cuda", f32, 64) == "triton"
    assert select("attention", "cuda", "cuda", f32, 64) == "cuda"
    monkeypatch.setattr(backends, "_chosen", {})
    monkeypatch.setattr(backends, "_triton_missing", lambda: "triton is not installed")
    assert select("attention", "auto", "cuda", f32, 64) == "cuda"
    with pytest.warns(PerformanceWarning, match="reference"):
        assert select("attention", "auto", "cuda", f32, 300) == "reference"


@pytest.mark.usefixtures("pretend_gpu")
@pytest.mark.parametrize(
    ("change", "why"),
    [
        (("_C_CUDA_ERROR", "No module named 'fastattn._C_cuda'"), "not built.*FASTATTN_CUDA=1"),
        (("_new_enough", lambda: False), "8.0"),
    ],
)
def test_reasons(monkeypatch: pytest.MonkeyPatch, change: tuple[str, Any], why: str) -> None:
    monkeypatch.setattr(backends, *change)
    row = {b.name: b for b in fastattn.backends()}["cuda"]
    assert not row.usable
    with pytest.raises(ValueError, match=why):
        select("attention", "cuda", "cuda", torch.float32, 64)
    assert select("attention", "auto", "cuda", torch.float32, 64) != "cuda"


@pytest.mark.usefixtures("pretend_gpu")
def test_rocm_has_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.version, "hip", "6.0")
    assert "ROCm" in {b.name: b for b in fastattn.backends()}["cuda"].why


# ---------------------------------------------------------------------------- before any launch


def test_a_direct_call_stays_inside_its_tensors(gpu: Device) -> None:
    """Whatever the op is called with: an error before any launch."""
    q, k, v = qkv()
    cu = torch.tensor([0, 9])
    p = [torch.randn(9, 2, 8) for _ in range(3)]
    refuses("k must have head_dim 8", *arguments(q, k[..., :7], v))
    refuses("v must have k's length 9, got 5", *arguments(q, k, v[:, :, :5]))
    refuses("one batch size", *arguments(q, k.expand(2, -1, -1, -1), v))
    refuses("multiple of k's", *arguments(q, *qkv(1, 3, 9, 8)[1:]))
    refuses("one dtype", *arguments(q, k.half(), v))
    refuses("head_dim up to 256, got 300", *arguments(*qkv(1, 1, 4, 300)))
    refuses("mask must be bool", *arguments(q, k, v, mask=torch.ones(9, 9)))
    refuses("mask dimension 1 must be 1 or 9", *arguments(q, k, v, mask=torch.ones(9, 8) > 0))
    refuses("bias dimension 0 must be 1 or 9, got 3", *arguments(q, k, v, bias=torch.ones(3, 9)))
    refuses("q_lens must have shape", *arguments(q, k, v, q_lens=torch.tensor([1, 2])))
    refuses("k_lens must be int32 or int64", *arguments(q, k, v, k_lens=torch.tensor([1.0])))
    refuses("alibi_slopes must have shape", *arguments(q, k, v, alibi_slopes=torch.ones(3)))
    refuses("sinks must have shape", *arguments(q, k, v, sinks=torch.ones(3)))
    refuses("dropout needs seed", *arguments(q, k, v, dropout_p=0.5))
    refuses("causal must be 0, 1 or 2", *arguments(q, k, v, causal=3))
    refuses("weights must be 0, 1 or 2", *arguments(q, k, v, weights=7))
    refuses("cu_seqlens_k must come with", *arguments(*p, cu_seqlens_q=cu))
    refuses(
        "cu_seqlens_k must have shape",
        *arguments(*p, cu_seqlens_q=cu, cu_seqlens_k=torch.tensor([0, 1, 2])),
    )
    refuses(
        "must not be negative",
        *arguments(*p, cu_seqlens_q=cu, cu_seqlens_k=cu, max_seqlen_k=-1),
    )
    refuses(
        r"Sq \+ Sk must be less than 2\^30",
        *arguments(*p, cu_seqlens_q=cu, cu_seqlens_k=cu, max_seqlen_k=2**30),
    )
    refuses(
        "at most 2147483647 for the kernels",
        *arguments(*p, cu_seqlens_q=cu, cu_seqlens_k=cu, max_seqlen_q=2**31),
    )
    assert not gpu.launches


def test_windows_beyond_the_ends_are_clamped(gpu: Device) -> None:
    q, k, v = qkv()
    far = OPS.attention_cuda_fwd(*arguments(q, k, v, window_left=2**40, window_right=2**62))
    for x, y in zip(far, OPS.attention_cuda_fwd(*arguments(q, k, v)), strict=True):
        torch.testing.assert_close(x, y)


# --------------------------------------------------------------------------- failures of launches


@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        ("cudaLaunchKernel", 9, r"cudaErrorInvalidConfiguration \(invalid configuration argument"),
        ("cudaLaunchKernel", 209, r"cudaErrorNoKernelImageForDevice \(no kernel image"),
        ("cudaLaunchKernel", 701, r"cudaErrorLaunchOutOfResources \(too many resources"),
        ("cudaFuncSetAttribute", 1, r"cudaErrorInvalidValue \(invalid argument"),
    ],
)
def test_a_failure_says_what_was_launched(gpu: Device, call: str, error: int, words: str) -> None:
    q, k, v = qkv(1, 2, 9, 8)
    fastattn.attention(q, k, v, backend="cuda")
    (made,) = gpu.launches
    with gpu.failing(call, error), pytest.raises(RuntimeError) as raised:
        fastattn.attention(q, k, v, backend="cuda")
    # `match` would not tell a missing number from one that is there by chance.
    text = str(raised.value)
    assert "fastattn::attention_cuda_fwd: " in text
    (kernel,) = [w for w in text.replace(",", " ").split() if w.endswith("_kernel")]
    assert kernel in made.kernel
    if call == "cudaLaunchKernel":
        assert f"grid {made.grid[0]}, block {made.block[0]}, {made.shared} bytes" in text
    assert "B 1 H 2 Sq 9 Sk 9 D 8 Dv 8" in text
    with pytest.raises(RuntimeError, match=words):
        with gpu.failing(call, error):
            fastattn.attention(q, k, v, backend="cuda")
    # No error stays behind for the next launch.
    right = reference.attention(q, k, v)
    torch.testing.assert_close(fastattn.attention(q, k, v, backend="cuda"), right)
    assert gpu.idle()


def test_the_weights_kernel_fails_by_its_own_name(gpu: Device) -> None:
    q, k, v = qkv()
    fastattn.attention(q, k, v, backend="cuda", return_weights=True)
    made = gpu.launches[1]
    with pytest.raises(RuntimeError, match="weights.*_kernel") as raised:
        original = gpu._launch

        def second_fails(launched: Any) -> int:
            error = original(launched)
            return 719 if b"weights" in launched.kernel else error

        gpu._launch = second_fails
        try:
            fastattn.attention(q, k, v, backend="cuda", return_weights=True)
        finally:
            gpu._launch = original
    assert f"grid {made.grid[0]}, block {made.block[0]}" in str(raised.value)


def test_an_architecture_without_code(gpu: Device) -> None:
    with gpu.playing("sm_75"), pytest.raises(RuntimeError, match="NoKernelImage|InvalidValue"):
        fastattn.attention(*qkv(), backend="cuda")


@pytest.mark.parametrize("arch", ["sm_86", "sm_120"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("head_dim", [64, 128, 256])
def test_shared_memory_of_the_smaller_architectures(
    gpu: Device, arch: str, dtype: torch.dtype, head_dim: int
) -> None:
    """99 KB a block on GeForce: every variant must fit, or its launch fails there."""
    q, k, v = qkv(1, 1, 5, head_dim, dtype=dtype)
    with gpu.playing(arch):
        fastattn.attention(q, k, v, backend="cuda")
        fastattn.attention(q, k, v, backend="cuda", softcap=2.0, return_weights=True)


# ------------------------------------------------------------------------------------- first use


@pytest.fixture
def unknown_gpu(gpu: Device, monkeypatch: pytest.MonkeyPatch, tmp_path: Any) -> Device:
    """CPU tensors stand for those of an sm_80 that nothing is known about."""
    monkeypatch.setenv("FASTATTN_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(first_use, "architecture", lambda device: "sm_80")
    monkeypatch.setattr(first_use, "_verdicts", None)
    monkeypatch.setattr(first_use, "generation", object())
    # A GPU's tiles would take the simulator minutes for every variant.
    monkeypatch.setattr(attention_first_use, "_SQ", 20)
    monkeypatch.setattr(attention_first_use, "_SK", 24)
    return gpu


def test_a_right_kernel_is_checked_once(unknown_gpu: Device) -> None:
    q, k, v = qkv()
    o = fastattn.attention(q, k, v, backend="cuda")
    torch.testing.assert_close(o, reference.attention(q, k, v), rtol=1e-5, atol=1e-5)
    assert len(unknown_gpu.launches) == 2  # the check's and ours
    (verdict,) = first_use.verdicts()
    assert (verdict.ok, verdict.variant) == (True, "cuda float32 D8 forward")
    fastattn.attention(q, k, v, backend="cuda")
    assert len(unknown_gpu.launches) == 3


def test_a_wrong_kernel_gives_way(unknown_gpu: Device, monkeypatch: pytest.MonkeyPatch) -> None:
    right = attention_cuda._kernel_fwd

    def wrong(*args: Any) -> tuple[Tensor, ...]:
        o, lse, lo, w = right(*args)
        return o * 1.001, lse, lo, w

    monkeypatch.setattr(attention_cuda, "_kernel_fwd", wrong)
    q, k, v = qkv()
    shared = arguments(scale=8**-0.5)
    with pytest.warns(first_use.KernelMismatchWarning, match="cuda float32 D8 forward is WRONG"):
        o, _, _ = op.forward_cuda(q, k, v, *shared)  # as `auto` calls it
    torch.testing.assert_close(o, reference.attention(q, k, v))
    with pytest.raises(ValueError, match="backend='cuda' is disabled for cuda float32 D8 forward"):
        fastattn.attention(q, k, v, backend="cuda")


def test_backends_do_not_share_verdicts(unknown_gpu: Device) -> None:
    q, k, v = qkv()
    fastattn.attention(q, k, v, backend="cuda")
    checks = []
    for backend in ("cuda", "triton"):
        attention_guard.may_run(
            backend, (q, k, v), arguments(), lambda: ("forward", lambda: checks.append(1))
        )
    assert checks == [1]  # Triton's: cuda's verdict is known


# ------------------------------------------------------------------------------------- autograd


def test_gradients_come_from_triton_where_it_can_serve(
    gpu: Device, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = []

    def backward(*args: Any) -> tuple[Tensor, ...]:
        calls.append(args)
        q, k, v = args[3:6]
        return q, k, v, q.new_empty(0), q.new_empty(0)

    monkeypatch.setattr(attention_cuda.attention_triton, "backward", backward)
    leaves = qkv(1, 2, 9, 8, requires_grad=True)
    o = fastattn.attention(*leaves, backend="cuda", deterministic=False)
    torch.autograd.grad(o.sum(), leaves)  # no Triton on CPU tensors: the reference formula
    assert not calls
    monkeypatch.setattr(attention_cuda, "can_serve", lambda *_: True)
    o = fastattn.attention(*leaves, backend="cuda", deterministic=False)
    grads = torch.autograd.grad(o.sum(), leaves)
    assert torch.equal(grads[0], leaves[0])
    ((do, dlse, dw, *_, deterministic, need),) = calls
    assert (do is None, dlse, dw) == (False, None, None)
    assert (deterministic, need) == (False, 7)


def test_double_backward_and_torch_func(gpu: Device) -> None:
    leaves = qkv(1, 1, 5, 4, dtype=torch.float32, requires_grad=True)

    def second(backend: str) -> tuple[Tensor, ...]:
        o = fastattn.attention(*leaves, causal=True, backend=backend)
        grads = torch.autograd.grad(o.square().sum(), leaves, create_graph=True)
        return torch.autograd.grad(sum(g.square().sum() for g in grads), leaves)

    for x, y in zip(second("cuda"), second("reference"), strict=True):
        torch.testing.assert_close(x, y, rtol=1e-4, atol=1e-4)

    def loss(q: Tensor, k: Tensor, v: Tensor, backend: str) -> Tensor:
        return fastattn.attention(q, k, v, causal=True, backend=backend).square().sum()

    batch = [torch.randn(2, 1, 1, 5, 4) for _ in range(3)]
    got, want = (
        torch.func.vmap(torch.func.grad(lambda *x, b=b: loss(*x, b), argnums=(0, 1, 2)))(*batch)
        for b in ("cuda", "reference")
    )
    for x, y in zip(got, want, strict=True):
        torch.testing.assert_close(x, y)


# ------------------------------------------------------------------------------- the compilers


def test_opcheck(gpu: Device) -> None:
    q, k, v = (x.requires_grad_() for x in qkv())
    args = arguments(q, k, v, bias=torch.randn(9, 9), weights=1)
    results = torch.library.opcheck(OPS.attention_cuda_fwd, args)
    assert set(results.values()) == {"SUCCESS"}
    o, lse, lo, w = (x.detach() for x in OPS.attention_cuda_fwd(*args))
    q, k, v = (x.detach() for x in (q, k, v))
    results = torch.library.opcheck(
        OPS.attention_cuda_bwd, (o, lse, w, q, k, v, o, lse, lo, *args[3:], 15)
    )
    assert set(results.values()) == {"SUCCESS"}


def test_opcheck_packed(gpu: Device) -> None:
    cu = torch.tensor([0, 4, 9])
    p = [torch.randn(11, 2, 8) for _ in range(3)]
    args = arguments(*p, cu_seqlens_q=cu, cu_seqlens_k=cu)
    results = torch.library.opcheck(OPS.attention_cuda_fwd, args)
    assert set(results.values()) == {"SUCCESS"}


def test_compiles_without_a_graph_break(gpu: Device) -> None:
    leaves = qkv(1, 2, 9, 8, requires_grad=True)

    def f(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return fastattn.attention(q, k, v, causal=True, backend="cuda") * 2

    torch._dynamo.reset()
    compiled = torch.compile(f, fullgraph=True, backend="aot_eager")
    for x, y in zip(
        torch.autograd.grad(compiled(*leaves).sum(), leaves),
        torch.autograd.grad(f(*leaves).sum(), leaves),
        strict=True,
    ):
        torch.testing.assert_close(x, y)
    assert len(gpu.launches) == 2


@pytest.mark.parametrize("case", ["plain", "all", "weights_mean", *PACKED])
def test_fake_cuda(case: str) -> None:
    """The fakes give what the CPU's kernels give, on the device, forward and backward."""
    found = op_calls(problem_named(case))
    fwd, bwd = found["attention_fwd"], found["attention_bwd"]
    for cuda, (func, args) in (
        (OPS.attention_cuda_fwd, (fwd[0], (*fwd[1], True))),
        (OPS.attention_cuda_bwd, (bwd[0], (*bwd[1][:-1], True, bwd[1][-1]))),
    ):
        plain = (*args[:-1],) if cuda is OPS.attention_cuda_fwd else (*args[:-2], args[-1])
        real = func(*plain)
        with FakeTensorMode():
            faked = cuda(*(on_fake_cuda(a) for a in args))
            for r, f in zip(real, faked, strict=True):
                assert (f.shape, f.dtype, f.device.type) == (r.shape, r.dtype, "cuda")
                assert r.numel() == 0 or f.stride() == r.stride()


@pytest.mark.usefixtures("pretend_gpu")
def test_the_public_function_on_fake_cuda_tensors() -> None:
    with FakeTensorMode():
        leaves = [torch.empty(2, 3, 9, 8, device="cuda", requires_grad=True) for _ in range(3)]
        lens = torch.empty(2, dtype=torch.int32, device="cuda")
        o, lse = fastattn.attention(*leaves, k_lens=lens, return_lse=True, backend="cuda")
        for grad, leaf in zip(fake_grads([o, lse], leaves), leaves, strict=True):
            assert grad is not None
            assert (grad.shape, grad.device) == (leaf.shape, leaf.device)


# ------------------------------------------------------------------------------------- modules


def test_module(gpu: Device) -> None:
    torch.manual_seed(3)
    ours = fastattn.nn.MultiheadAttention(16, 2, batch_first=True, backend="cuda")
    theirs = torch.nn.MultiheadAttention(16, 2, batch_first=True)
    theirs.load_state_dict(ours.state_dict())
    x = torch.randn(2, 7, 16)
    hidden = torch.zeros(2, 7, dtype=torch.bool)
    hidden[1, 4:] = True
    for module in (ours, theirs):
        module.zero_grad()
    results = []
    for module in (ours, theirs):
        y, w = module(x, x, x, key_padding_mask=hidden)
        y.square().sum().backward()
        results.append((y, w, module.in_proj_weight.grad, module.out_proj.weight.grad))
    for got, want in zip(*results, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)
    assert len(gpu.launches) == 2


def test_swap(gpu: Device) -> None:
    layer = torch.nn.TransformerEncoderLayer(16, 2, 32, dropout=0.0, batch_first=True)
    x = torch.randn(2, 7, 16)
    want = layer(x)
    fastattn.swap(layer, backend="cuda")
    out = layer(x)
    torch.testing.assert_close(out, want, rtol=1e-4, atol=1e-5)
    out.sum().backward()
    assert len(gpu.launches) == 1
    assert layer.self_attn.in_proj_weight.grad is not None


def test_nothing_warns(gpu: Device) -> None:
    problem = padded(b=1, h=1, sq=4, d=8)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fastattn.attention(problem.q, problem.k, problem.v, backend="cuda")
        p = packed([3, 1], h=1, d=8)
        fastattn.attention_varlen(p.q, p.k, p.v, *p.cu_seqlens, backend="cuda")
