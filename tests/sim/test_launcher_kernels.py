"""`_kernels`, the dev-only module over the torch-free launchers."""

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

import fastattn
from fastattn import reference
from sim import kernels, operators


def problem(dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    q = torch.randn(2, 4, 21, 24).to(dtype)
    k, v = torch.randn(2, 2, 30, 24).to(dtype), torch.randn(2, 2, 30, 16).to(dtype)
    lse = torch.full((2, 4, 21), float("nan"))
    o = torch.full((2, 4, 21, 16), float("nan"), dtype=dtype)
    return {"q": q, "k": k, "v": v, "o": o, "lse": lse, "lse_lo": lse.clone()}


@pytest.fixture(autouse=True)
def _forget() -> Iterator[None]:
    yield
    kernels.device().forget()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_the_cpu_launcher(dtype: torch.dtype) -> None:
    x = problem(dtype)
    p = kernels.cpu_call(**x)
    p.causal = 2
    kernels.module().cpu.attention_forward(p)
    right = fastattn.attention(
        x["q"], x["k"], x["v"], causal="bottom_right", return_lse=True, backend="cpu"
    )
    assert torch.equal(x["o"], right[0])
    assert torch.equal(x["lse"], right[1])


def test_the_cpu_backward() -> None:
    x = problem()
    p = kernels.cpu_call(**x)
    m = kernels.module()
    m.cpu.attention_forward(p)
    do = torch.randn_like(x["o"])
    grads = {n: torch.empty_like(x[n[1:]]) for n in ("dq", "dk", "dv")}
    g = m.cpu.AttentionGrads()
    g.d_o = kernels.operand(do)
    for name, grad in grads.items():
        setattr(g, name, kernels.operand(grad))
    m.cpu.attention_backward(p, g)
    leaves = [x[n].clone().requires_grad_() for n in "qkv"]
    right = torch.autograd.grad(reference.attention(*leaves), leaves, do)
    for got, want in zip(grads.values(), right, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_the_cuda_launchers(dtype: torch.dtype) -> None:
    """Bitwise what the op gives: the binding adds nothing."""
    x = problem(dtype)
    m, gpu = kernels.module(), kernels.device()
    p = kernels.cuda_call(**x)
    p.causal = 2
    slopes, lens = torch.rand(4), torch.tensor([30, 17])
    p.alibi = kernels.give(gpu, slopes, name="alibi")
    integers = m.cuda.Integers()
    integers.ptr, integers.wide = kernels.give(gpu, lens, name="k_lens"), True
    p.k_lens = integers
    w = torch.empty(2, 4, 21, 30, dtype=dtype)
    kernels.give(gpu, w, name="weights")
    p.weights, p.weights_mode = kernels.operand(w), 1
    gpu.launches.clear()
    both = [m.cuda.attention_forward(p), m.cuda.attention_weights(p)]
    assert [made.error for made in both] == [0, 0], gpu.faults
    for made, launch in zip(both, gpu.launches, strict=True):
        assert made.kernel in launch.kernel
        assert (made.grid, made.block, made.shared) == (
            launch.grid[0], launch.block[0], launch.shared,
        )  # fmt: skip
    with operators.on_cpu():
        o, lse, weights = fastattn.attention(
            x["q"], x["k"], x["v"], causal="bottom_right", alibi_slopes=slopes, k_lens=lens,
            return_lse=True, return_weights=True, backend="cuda",
        )  # fmt: skip
    assert torch.equal(x["o"], o)
    assert torch.equal(x["lse"], lse)
    assert torch.equal(w, weights)


_TELLS_APART = ("kernel", "dtype", "head_dim", "laden", "atomics")


def test_every_variant_fits_the_smallest_architecture() -> None:
    """99 KB a block (8.6, 8.9, 12.0), and nothing is compiled that no launch could choose."""
    m = kernels.module().cuda
    tables = (
        m.attention_forward_variants(),
        m.attention_weights_variants(),
        m.attention_backward_variants(),
        m.attention_kv_cache_variants(),
    )
    for variants in tables:
        keys = [tuple(v[n] for n in _TELLS_APART) for v in variants]
        assert len(set(keys)) == len(keys) > 0
        assert {v["dtype"] for v in variants} == {0, 1, 2}
        for v in variants:
            assert v["shared"] <= 99 << 10, v
            assert v["threads"] % 32 == 0
    registered = [name for name in kernels.device().registered() if "attention" in name]
    assert len(registered) == sum(map(len, tables))


def test_errors_come_back_as_they_are() -> None:
    m, gpu = kernels.module(), kernels.device()
    p = kernels.cuda_call(**problem())
    with gpu.failing("cudaLaunchKernel", 701):
        made = m.cuda.attention_forward(p)
    assert m.cuda.error_name(made.error) == "cudaErrorLaunchOutOfResources"
    assert m.cuda.error_text(made.error) == "too many resources requested for launch"
    p.D = 257
    assert m.cuda.attention_forward(p).error != 0
