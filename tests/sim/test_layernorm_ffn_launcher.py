"""layernorm_ffn on the CUDA backend as it is called: choice, refusals, failing launches, first use,
autograd, compilers. Kernels run in the PTX simulator, on shapes of one tile."""

import importlib
import re
from typing import Any

import pytest
import torch
from ffn_tools import Call, ffn, run
from test_attention_ops import op_calls_of
from tools import fake_grads, on_fake_cuda
from torch import Tensor
from torch._subclasses import FakeTensorMode

import fastattn
from fastattn import first_use
from fastattn.backends import ffn_block_pays, select_layernorm_ffn
from fastattn.ops import layernorm_ffn_cuda
from fastattn.ops import layernorm_ffn_op as op
from sim.cudart import Device

backends = importlib.import_module("fastattn.backends")
OPS = torch.ops.fastattn
BF16 = torch.bfloat16
BACKWARD = ["bwd_prepare", "bwd_rows", "bwd_weights", "bwd_sum"]
NUMBERS = (1, 1e-5, 0, True, True, 0.0, 0.0)  # norm, eps, act, pre_norm, residual, dropouts


def launched(gpu: Device) -> list[str]:
    return [re.findall(r"\dlayernorm_ffn_([a-z_]+)_kernel", x.kernel)[0] for x in gpu.launches]


def small(**kwargs: Any) -> Call:
    return ffn(5, d=16, f=24, **{"dtype": BF16, **kwargs})


def arguments(call: Call, *numbers: Any) -> tuple[Any, ...]:
    """Of the op: tensors in the schema's order, seed, numbers."""
    names = ("x", "w1", "b1", "w2", "b2", "w_gate", "b_gate", "norm_weight", "norm_bias")
    return (*(call.tensors.get(n) for n in names), None, *(numbers or NUMBERS))


# ------------------------------------------------------------------------------------------ choice


def test_without_the_stand_in_the_cpu_is_refused() -> None:
    with pytest.raises(ValueError, match=r"layernorm_ffn: backend='cuda'.*CUDA tensors"):
        run(small(), "cuda")
    with pytest.raises(ValueError, match="CUDA tensors"):
        OPS.layernorm_ffn_cuda_fwd(*arguments(small()), 0)


def test_what_it_cannot_serve_is_named(gpu: Device) -> None:
    for call in (ffn(3, d=257, f=8), ffn(3, d=300, f=8)):
        with pytest.raises(
            ValueError, match=rf"up to 256 columns.*got {call.tensors['x'].shape[1]}"
        ):
            run(call, "cuda")
    with pytest.raises(ValueError, match=r"float32, bfloat16 and float16, got x.dtype"):
        run(ffn(3, d=8, f=8, dtype=torch.float64), "cuda")
    with pytest.raises(ValueError, match="takes CUDA tensors, got device 'cpu'"):
        run(small(), "triton")
    assert not gpu.launches


def test_auto_leaves_cpu_tensors_to_the_cpu(gpu: Device) -> None:
    run(small(), "auto")
    assert not gpu.launches


def test_the_order_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """CUDA C++'s block in one kernel where it pays; Triton otherwise."""
    monkeypatch.setattr(backends, "_cuda_missing", lambda: None)
    monkeypatch.setattr(backends, "_new_enough", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: (9, 0))
    monkeypatch.setattr(backends, "_chosen", {})

    def chosen(rows: int, width: int, training: bool) -> str:
        return select_layernorm_ffn("auto", "cuda", BF16, rows, width, training)

    monkeypatch.setattr(backends, "_triton_missing", lambda: None)
    assert chosen(4096, 256, True) == "triton"
    assert chosen(4096, 256, False) == chosen(4096, 128, True) == chosen(64, 256, True) == "cuda"
    assert select_layernorm_ffn("cuda", "cuda", BF16, 4096, 256, True) == "cuda"
    assert chosen(4, 257, False) == chosen(2**16, 4096, True) == "triton"
    assert not ffn_block_pays(4, 257, training=False)


# ---------------------------------------------------------------------------- before any launch


def refusals() -> dict[str, tuple[Any, ...]]:
    """What the binding says, and the op's arguments that make it."""
    good, wide = small().tensors, torch.ones

    def with_(**change: Any) -> tuple[Any, ...]:
        return arguments(Call("layernorm_ffn", {**good, **change}))

    def numbered(**change: Any) -> tuple[Any, ...]:
        names = ("norm", "eps", "act", "pre_norm", "residual", "dropout_p", "hidden_dropout_p")
        given = dict(zip(names, NUMBERS, strict=True)) | change
        return arguments(small(), *given.values())

    bf16 = {"dtype": BF16}
    return {
        r"w2 must have 24 columns to match w1 \(24, 16\), got \(16, 23\)": with_(
            w2=wide(16, 23, **bf16)
        ),
        r"x must have 16 columns to match w1, got \(5, 15\)": with_(x=wide(5, 15, **bf16)),
        r"w1 must have shape \(out, in\)": with_(w1=wide(24, **bf16)),
        "w1 and w2 must have one dtype": with_(w2=wide(16, 24)),
        "x must be float32 or have w1's dtype": with_(x=wide(5, 16).half()),
        r"w_gate must have w1's shape \(24, 16\)": with_(w_gate=wide(16, 24, **bf16)),
        "b_gate needs w_gate": with_(b_gate=wide(24)),
        r"b1 must have 24 elements, got shape \(23,\)": with_(b1=wide(23)),
        r"norm_weight must have 16 elements, got shape \(24,\)": with_(norm_weight=wide(24)),
        "up to 256 columns, got 16 and 257": with_(w2=wide(257, 24, **bf16)),
        "the residual needs w2 with 16 rows": with_(w2=wide(17, 24, **bf16), b2=None),
        "dropout needs seed": numbered(dropout_p=0.5),
        r"dropout must be in \[0, 1\), got 1": numbered(hidden_dropout_p=1.0),
        "norm or act out of range": numbered(act=5),
        "b2 must be float32, bfloat16 or float16": with_(b2=wide(16, dtype=torch.int32)),
    }


@pytest.mark.parametrize("words", refusals())
def test_a_direct_call_stays_inside_its_tensors(gpu: Device, words: str) -> None:
    """Whatever the op is called with: an error before any launch."""
    with pytest.raises(RuntimeError, match=rf"fastattn::layernorm_ffn_cuda: .*{words}"):
        OPS.layernorm_ffn_cuda_fwd(*refusals()[words], 0)
    assert not gpu.launches
    assert gpu.idle()


def test_what_the_backward_refuses(gpu: Device) -> None:
    args = arguments(small())
    y, *saved = OPS.layernorm_ffn_cuda_fwd(*args, op.SAVE_STATS)
    gpu.launches.clear()

    def backward(dy: Tensor, *given: Tensor) -> None:
        OPS.layernorm_ffn_cuda_bwd(dy, *args[:10], *given, *NUMBERS, 511)

    with pytest.raises(RuntimeError, match="dy must have the output's shape and dtype"):
        backward(y[:4], *saved)
    with pytest.raises(RuntimeError, match="dy must have the output's shape and dtype"):
        backward(y.float(), *saved)
    for i, name in ((1, "mean"), (2, "rstd")):
        wrong = list(saved)
        wrong[i] = wrong[i][:4]
        with pytest.raises(RuntimeError, match=f"{name} must be the forward's"):
            backward(y, *wrong)
    with pytest.raises(RuntimeError, match="save nothing of the hidden layer"):
        OPS.layernorm_ffn_cuda_fwd(*args, 7)
    assert not gpu.launches


# ------------------------------------------------------------------------------- failing launches


@pytest.mark.parametrize("kernel", ["fwd", "end"])
def test_a_failing_launch_says_what_it_was(gpu: Device, kernel: str) -> None:
    call = ffn(5, d=16, f=600 if kernel == "end" else 24, dtype=BF16)
    with torch.no_grad():
        right = call.run(fastattn, call.leaves(), backend="cuda")["y"]
        made = gpu.launches[-1]
        assert kernel in made.kernel
        original, left = gpu._launch, [len(gpu.launches)]

        def last_fails(launch: Any) -> int:
            left[0] -= 1
            return original(launch) if left[0] else 701

        gpu._launch = last_fails  # type: ignore[method-assign]
        try:
            with pytest.raises(RuntimeError) as raised:
                call.run(fastattn, call.leaves(), backend="cuda")
        finally:
            gpu._launch = original  # type: ignore[method-assign]
        text = str(raised.value)
        assert "layernorm_ffn_cuda_fwd: cudaErrorLaunchOutOfResources" in text
        assert f"layernorm_ffn_{kernel}_kernel, grid {made.grid[0]}, block 128" in text
        assert f"M 5 D 16 F {call.tensors['w1'].shape[0]} Dout 16" in text
        # No error stays behind for the next launch.
        assert torch.equal(call.run(fastattn, call.leaves(), backend="cuda")["y"], right)
    assert gpu.idle()


def test_shared_memory_of_the_smaller_architectures(gpu: Device) -> None:
    """99 KB a block are enough for every width and dtype, gated or not."""
    from sim.kernels import module

    for way in ("forward", "backward"):
        for v in getattr(module().cuda, f"layernorm_ffn_{way}_variants")():
            assert v["shared"] <= 99 << 10, v
    with gpu.playing("sm_120"):
        run(small(gated=True), "cuda")
    assert launched(gpu) == ["fwd", *BACKWARD]


def test_every_launch_goes_to_the_device_and_stream_of_the_call(gpu: Device) -> None:
    with gpu.placed(1, 7) as stream:
        run(small(), "cuda")
    assert {(x.device, x.stream) for x in gpu.launches} == {(1, stream)}
    assert launched(gpu) == ["fwd", *BACKWARD]


# ------------------------------------------------------------------------------------- first use


@pytest.fixture
def unknown_gpu(gpu: Device, monkeypatch: pytest.MonkeyPatch, tmp_path: Any) -> Device:
    """CPU tensors stand for those of an sm_80 that nothing is known about."""
    monkeypatch.setenv("FASTATTN_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(first_use, "architecture", lambda device: "sm_80")
    monkeypatch.setattr(first_use, "_verdicts", None)
    monkeypatch.setattr(first_use, "generation", object())
    return gpu


def test_right_kernels_are_checked_once(unknown_gpu: Device) -> None:
    call = small(gated=True, hidden_dropout_p=0.1, seed=3)
    first = run(call, "cuda").all()
    verdicts = {v.variant: v for v in first_use.verdicts()}
    name = "cuda bfloat16 D16 F24 gelu pre layer gated hidden dropout b1 bfloat16 b2 bfloat16 bg"
    name += " bfloat16 nw bfloat16 nb bfloat16"
    assert set(verdicts) == {f"{name} forward", f"{name} backward 511"}
    assert all(v.ok for v in verdicts.values()), verdicts
    before = len(unknown_gpu.launches)
    again = run(call, "cuda").all()
    assert len(unknown_gpu.launches) == before + 1 + len(BACKWARD)
    assert all(torch.equal(again[n], first[n]) for n in first)


def test_a_wrong_kernel_gives_way(unknown_gpu: Device, monkeypatch: pytest.MonkeyPatch) -> None:
    right = layernorm_ffn_cuda.kernel_fwd

    def wrong(*args: Any) -> tuple[Tensor, ...]:
        y, *rest = right(*args)
        return y * 1.1, *rest

    monkeypatch.setattr(layernorm_ffn_cuda, "kernel_fwd", wrong)
    for pre_norm in (True, False):
        call = small(pre_norm=pre_norm)
        args = arguments(call, *NUMBERS[:3], pre_norm, *NUMBERS[4:])
        with pytest.warns(first_use.KernelMismatchWarning, match="forward is WRONG.*y is off by"):
            found = OPS.layernorm_ffn_cuda_fwd(*args, op.SAVE_STATS)  # as `auto` calls it
        plain = call.run(fastattn.reference, call.leaves())["y"]
        torch.testing.assert_close(found[0], plain)
        for x, kernels in zip(found[1:], right(*args, op.SAVE_STATS)[1:], strict=True):
            torch.testing.assert_close(x, kernels, rtol=1e-2, atol=1e-2)
        with pytest.raises(ValueError, match="backend='cuda' is disabled for cuda bfloat16 D16"):
            run(call, "cuda")


def test_a_wrong_backward_gives_way(unknown_gpu: Device, monkeypatch: pytest.MonkeyPatch) -> None:
    right = layernorm_ffn_cuda.kernel_bwd

    def wrong(*args: Any) -> tuple[Tensor, ...]:
        dx, *rest = right(*args)
        return dx * 1.1, *rest

    monkeypatch.setattr(layernorm_ffn_cuda, "kernel_bwd", wrong)
    call = small()
    args = arguments(call)
    y, *saved = OPS.layernorm_ffn_cuda_fwd(*args, op.SAVE_STATS)
    dy = torch.randn(y.shape).to(y)
    with pytest.warns(first_use.KernelMismatchWarning, match="backward 511 is WRONG.*dx is off by"):
        grads = OPS.layernorm_ffn_cuda_bwd(dy, *args[:10], *saved, *NUMBERS, 511)
    leaves = call.leaves()
    plain = torch.autograd.grad(
        call.run(fastattn.reference, leaves)["y"], [leaves["x"], leaves["w1"]], dy
    )
    for x, g in zip(grads, plain, strict=False):
        torch.testing.assert_close(x, g)


# ------------------------------------------------------------------------- autograd and compilers


@pytest.mark.parametrize("pre_norm", [True, False])
def test_opcheck(gpu: Device, pre_norm: bool) -> None:
    call = small(pre_norm=pre_norm, gated=True)
    calls = op_calls_of(lambda: run(call, "cuda"))
    assert set(calls) == {"layernorm_ffn_cuda_fwd", "layernorm_ffn_cuda_bwd"}
    for name, (func, args) in calls.items():
        floats = tuple(
            a.detach().requires_grad_(name.endswith("fwd"))
            if isinstance(a, Tensor) and a.is_floating_point()
            else a
            for a in args
        )
        result = torch.library.opcheck(func, floats)
        assert set(result.values()) == {"SUCCESS"}, name


def test_compiles_without_a_graph_break(gpu: Device) -> None:
    call = small(hidden_dropout_p=0.3, seed=torch.tensor([4]))
    leaves = call.leaves()

    def f(*tensors: Tensor) -> Tensor:
        given = dict(zip(leaves, tensors, strict=True))
        return fastattn.layernorm_ffn(**given, **call.kwargs, backend="cuda") * 2

    torch._dynamo.reset()
    compiled = torch.compile(f, fullgraph=True, backend="aot_eager")
    inputs = tuple(leaves.values())
    for x, y in zip(
        torch.autograd.grad(compiled(*inputs).float().sum(), inputs),
        torch.autograd.grad(f(*inputs).float().sum(), inputs),
        strict=True,
    ):
        torch.testing.assert_close(x, y)
    assert launched(gpu) == 2 * ["fwd", *BACKWARD]


def test_double_backward_and_torch_func(gpu: Device) -> None:
    call = ffn(3, d=8, f=12, gated=True)
    leaves = call.leaves()
    inputs = list(leaves.values())

    def second(backend: str) -> tuple[Tensor, ...]:
        y = call.run(fastattn, leaves, backend=backend)["y"]
        grads = torch.autograd.grad(y.square().sum(), inputs, create_graph=True)
        return torch.autograd.grad(sum(g.square().sum() for g in grads), inputs)

    for x, y in zip(second("cuda"), second("reference"), strict=True):
        torch.testing.assert_close(x, y, rtol=1e-3, atol=1e-3)

    def loss(x: Tensor, backend: str) -> Tensor:
        given = {**call.tensors, "x": x}
        return fastattn.layernorm_ffn(**given, **call.kwargs, backend=backend).square().sum()

    got, want = (
        torch.func.grad(lambda x, b=b: loss(x, b))(call.tensors["x"]) for b in ("cuda", "reference")
    )
    torch.testing.assert_close(got, want)


def test_fakes_on_cuda(gpu: Device) -> None:
    """The fakes give what the kernels give, on the device, forward and backward."""
    for pre_norm in (True, False):
        calls = op_calls_of(lambda p=pre_norm: run(small(pre_norm=p, gated=True), "cuda"))
        for func, args in calls.values():
            real = func(*args)
            with FakeTensorMode():
                for r, f in zip(real, func(*(on_fake_cuda(a) for a in args)), strict=True):
                    assert (f.shape, f.dtype, f.device.type) == (r.shape, r.dtype, "cuda")
                    assert r.numel() == 0 or f.stride() == r.stride()


def test_the_public_function_on_fake_cuda_tensors(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backends, "_cuda_missing", lambda: None)
    monkeypatch.setattr(backends, "_new_enough", lambda: True)
    monkeypatch.setattr(backends, "_chosen", {})
    with FakeTensorMode():
        x, w1, w2 = (
            torch.empty(*shape, device="cuda", requires_grad=True)
            for shape in ((2, 9, 64), (128, 64), (64, 128))
        )
        y = fastattn.layernorm_ffn(x, w1, None, w2, None, backend="cuda")
        assert (y.shape, y.device.type) == (x.shape, "cuda")
        with torch.no_grad():  # what an engine does that is not asked for a graph
            grads = fake_grads([y], [x, w1, w2])
        for grad, leaf in zip(grads, (x, w1, w2), strict=True):
            assert grad is not None
            assert (grad.shape, grad.device) == (leaf.shape, leaf.device)
