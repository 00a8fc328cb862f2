"""The CUDA backend as it is called: choice, refusals, first use, autograd, compilers, modules.
Kernels run in the PTX simulator, on shapes of one tile."""

import importlib
import re
import warnings
from collections import Counter
from dataclasses import replace
from typing import Any

import pytest
import torch
from refused_calls import arguments, qkv, refused, refused_backward
from test_attention_ops import PACKED, op_calls, problem_named
from tools import fake_grads, on_fake_cuda, packed, padded
from torch import Tensor
from torch._subclasses import FakeTensorMode

import fastattn
from fastattn import first_use, reference
from fastattn.backends import PerformanceWarning, select
from fastattn.ops import attention_cuda, attention_first_use, attention_guard
from fastattn.ops import attention_op as op
from sim import operators
from sim.cudart import Device

backends = importlib.import_module("fastattn.backends")
OPS = torch.ops.fastattn


BACKWARD = ["attention_bwd_prepare", "attention_bwd_keys", "attention_bwd_rows"]
FORWARD_AND_BACKWARD = ["attention_fwd", *BACKWARD]


def launched(gpu: Device) -> list[str]:
    """Kernels by name, in order."""
    return [re.findall(r"(attention_[a-z_]+)_kernel", x.kernel)[-1] for x in gpu.launches]


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


BUILD = backends.CudaBuild(runtime=(13, 0), driver=(13, 0), cubins=("80",), ptx=("80",))


@pytest.fixture
def pretend_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine with an sm_80, as far as choosing a backend goes."""
    monkeypatch.setattr(backends, "_C_CUDA_ERROR", "")
    monkeypatch.setattr(backends, "cuda_build", lambda: BUILD)
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
    assert select("attention", "triton", "cuda", f32, 64) == "triton"
    order = {  # 16 bit, fp32
        (8, 0): ("cuda", "cuda"), (8, 9): ("cuda", "triton"), (9, 0): ("triton", "cuda"),
        (10, 0): ("triton", "triton"), (12, 0): ("cuda", "triton"),
    }  # fmt: skip
    for capability, (narrow, wide) in order.items():
        monkeypatch.setattr(backends, "_chosen", {})
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_, c=capability: c)
        assert select("attention", "auto", "cuda", torch.bfloat16, 64) == narrow, capability
        assert select("attention", "auto", "cuda", f32, 64) == wide, capability
    for missing, left in (("_triton_missing", "cuda"), ("_cuda_missing", "triton")):
        with monkeypatch.context() as patch:
            patch.setattr(backends, "_chosen", {})
            patch.setattr(backends, missing, lambda: "it is not installed")
            for dtype in (f32, torch.float16):
                assert select("attention", "auto", "cuda", dtype, 64) == left
    monkeypatch.setattr(backends, "_chosen", {})
    with pytest.warns(PerformanceWarning, match="reference"):
        assert select("attention", "auto", "cuda", f32, 300) == "reference"


@pytest.mark.usefixtures("pretend_gpu")
@pytest.mark.parametrize(
    ("change", "why"),
    [
        (("_C_CUDA_ERROR", "No module named 'fastattn._C_cuda'"), "not built.*FASTATTN_CUDA=1"),
        (("_new_enough", lambda: False), "8.0"),
        (("cuda_build", lambda: replace(BUILD, driver=(12, 8))), "needs driver 580 or later"),
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
    for words, args in refused():
        refuses(words, *args)
    cu, p = torch.tensor([0, 9]), [torch.randn(9, 2, 8) for _ in range(3)]
    both = {"cu_seqlens_q": cu, "cu_seqlens_k": cu}
    refuses(r"Sq \+ Sk must be less than 2\^30", *arguments(*p, **both, max_seqlen_k=2**30))
    for words, args in refused_backward():
        with pytest.raises(RuntimeError, match=words):
            OPS.attention_cuda_bwd(*args)
    assert not gpu.launches


def test_windows_beyond_the_ends_are_clamped(gpu: Device) -> None:
    q, k, v = qkv()
    far = OPS.attention_cuda_fwd(*arguments(q, k, v, window_left=2**40, window_right=2**62))
    for x, y in zip(far, OPS.attention_cuda_fwd(*arguments(q, k, v)), strict=True):
        torch.testing.assert_close(x, y)


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


def test_a_right_backward_is_checked_once(unknown_gpu: Device) -> None:
    leaves = qkv(requires_grad=True)
    for _ in range(2):
        o = fastattn.attention(*leaves, causal=True, backend="cuda")
        grads = torch.autograd.grad(o.sum(), leaves)
    right = torch.autograd.grad(reference.attention(*leaves, causal=True).sum(), leaves)
    for got, want in zip(grads, right, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)
    verdicts = {v.variant: v.ok for v in first_use.verdicts()}
    name = "cuda float32 D8 causal"
    assert verdicts == {f"{name} forward": True, f"{name} backward 7 of do": True}
    # Two calls and the check of the forward; two, and a check that has a forward of its own.
    assert Counter(launched(unknown_gpu)) == {
        "attention_fwd": 4, **dict.fromkeys(BACKWARD, 3),
    }  # fmt: skip


def test_a_wrong_backward_gives_way(unknown_gpu: Device, monkeypatch: pytest.MonkeyPatch) -> None:
    right = attention_cuda._kernel_bwd

    def wrong(*args: Any, **how: Any) -> tuple[Tensor, ...]:
        dq, *rest = right(*args, **how)
        return dq * 1.001, *rest

    monkeypatch.setattr(attention_cuda, "_kernel_bwd", wrong)
    leaves = qkv(requires_grad=True)
    o, _, _ = op.forward_cuda(*leaves, *arguments(scale=8**-0.5))  # as `auto` calls it
    with pytest.warns(first_use.KernelMismatchWarning, match="D8 backward 7 of do is WRONG"):
        grads = torch.autograd.grad(o.sum(), leaves)
    want = torch.autograd.grad(reference.attention(*leaves).sum(), leaves)
    for x, y in zip(grads, want, strict=True):
        torch.testing.assert_close(x, y)


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
    assert launched(gpu) == 2 * FORWARD_AND_BACKWARD


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
    assert launched(gpu) == ["attention_fwd", "attention_weights", *BACKWARD]


def test_swap(gpu: Device) -> None:
    """A whole encoder layer; residual and norm, which CUDA C++ has no kernel of, take "auto"."""
    layer = torch.nn.TransformerEncoderLayer(16, 2, 32, dropout=0.0, batch_first=True)
    x = torch.randn(2, 7, 16)
    want = layer(x)
    fastattn.swap(layer, backend="cuda")
    out = layer(x)
    torch.testing.assert_close(out, want, rtol=1e-4, atol=1e-5)
    out.sum().backward()
    found = [re.findall(r"(attention_[a-z_]+|ffn_[a-z_]+)_kernel", x.kernel) for x in gpu.launches]
    names = [x[-1] for x in found if x]
    assert [n for n in names if n.startswith("attention")] == FORWARD_AND_BACKWARD
    assert any(n.startswith("ffn") for n in names)
    assert layer.self_attn.in_proj_weight.grad is not None


def test_nothing_warns(gpu: Device) -> None:
    problem = padded(b=1, h=1, sq=4, d=8)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fastattn.attention(problem.q, problem.k, problem.v, backend="cuda")
        p = packed([3, 1], h=1, d=8)
        fastattn.attention_varlen(p.q, p.k, p.v, *p.cu_seqlens, backend="cuda")
