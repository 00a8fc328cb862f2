"""The check before the first use of the passes of layernorm_ffn, under ttsem, on kernels with a
bug."""

import importlib.util
import warnings
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from ffn_tools import Call, by_reference, ffn, run
from test_bias_act import act_call
from test_layernorm import norm_call

import fastattn
from fastattn import first_use
from fastattn.kernels import bias_act, layernorm
from fastattn.ops import layernorm_ffn_op as ffn_op
from fastattn.ops import layernorm_first_use
from fastattn.ops import layernorm_op as op
from rungs.semantics import Session, semantics

MODULES = {"layernorm": layernorm, "bias_act": bias_act}


@pytest.fixture(autouse=True)
def gpu(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Session]:
    """CPU tensors stand for those of an sm_80 that nothing is known about."""
    monkeypatch.setenv("FASTATTN_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(first_use, "architecture", lambda device: "sm_80")
    monkeypatch.setattr(first_use, "_verdicts", None)
    monkeypatch.setattr(first_use, "generation", object())
    # Several of the CPU's small tiles; a GPU's large ones need more, and there it costs nothing.
    monkeypatch.setattr(layernorm_first_use, "_ELEMENTS", 700)
    with semantics() as session:
        yield session


def break_kernel(
    monkeypatch: pytest.MonkeyPatch, folder: Path, module: str, kernel: str, right: str, wrong: str
) -> None:
    path = Path(MODULES[module].__file__ or "")
    text = path.read_text()
    assert text.count(right) == 1
    file = folder / f"broken_{module}.py"
    file.write_text(text.replace(right, wrong))
    spec = importlib.util.spec_from_file_location(file.stem, file)
    assert spec is not None
    assert spec.loader is not None
    broken = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(broken)
    monkeypatch.setattr(MODULES[module], kernel, getattr(broken, kernel))


def near(got: dict[str, torch.Tensor], call: Call) -> None:
    for name, x in by_reference(call, lambda x: x.double()).all().items():
        torch.testing.assert_close(got[name].double(), x, rtol=1e-4, atol=1e-4, msg=name)


def test_right_kernels_are_checked_once(gpu: Session) -> None:
    call = norm_call("layer_norm", 5, 16)
    near(run(call, "triton").all(), call)
    assert [(v.op, v.ok) for v in first_use.verdicts()] == [("add_layer_norm", True)] * 2
    assert [v.variant for v in first_use.verdicts()] == [
        "triton norm backward N16 f32.-.f32.f32.f32.f32 norm=layer dx_dtype=f32 sums=f32.f32.-",
        "triton norm forward N16 f32.-.-.f32.f32 norm=layer y_dtype=f32 stats",
    ]
    launches = gpu.launches
    run(call, "triton")
    assert gpu.launches == launches + 3


def test_every_feature_is_checked_as_it_is_called() -> None:
    calls = [
        norm_call("add_layer_norm", 5, 16, dtype=torch.bfloat16, params=torch.float32,
                  dropout_p=0.2, seed=1),
        norm_call("rms_norm", 3, 150),
        act_call(5, 16, gated=True, activation="silu", dtype=torch.float16, dropout_p=0.1, seed=2),
        ffn(5, d=16, f=24, pre_norm=False, dropout_p=0.2, seed=3, recompute="activation"),
        ffn(5, d=16, f=24, norm=None, gated=True),
    ]  # fmt: skip
    for call in calls:
        run(call, "triton")
    assert all(v.ok for v in first_use.verdicts()), first_use.verdicts()
    assert len(first_use.verdicts()) >= 2 * len(calls)


LOST_MEAN = ("layernorm", "norm_forward_kernel", "y = y - mean[:, None]", "y = y + 0.0")
LOST_TERM = ("layernorm", "norm_backward_kernel", "grad = grad - c1[:, None]", "grad = grad + 0.0")
LOST_GATE = ("bias_act", "act_backward_kernel", "dgate = da * up * slope", "dgate = da * slope")


def test_a_wrong_forward_gives_way(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    break_kernel(monkeypatch, tmp_path, *LOST_MEAN)
    x = torch.randn(5, 16) + 3
    right = torch.nn.functional.layer_norm(x, (16,))

    def as_auto() -> torch.Tensor:
        return op.add_norm(x, None, None, None, None, 1, 1e-5, 0.0, 16, backend="triton")[0]

    with pytest.warns(first_use.KernelMismatchWarning, match="norm forward N16.*y is off by"):
        torch.testing.assert_close(as_auto(), right)
    with warnings.catch_warnings():  # loud once
        warnings.simplefilter("error")
        torch.testing.assert_close(as_auto(), right)
    with pytest.raises(ValueError, match="add_layer_norm: backend='triton' is disabled"):
        fastattn.layer_norm(x, 16, backend="triton")


@pytest.mark.parametrize("bug", [LOST_TERM, LOST_GATE], ids=["norm", "act"])
@pytest.mark.parametrize("pre_norm", [True, False])
def test_a_wrong_pass_of_the_block_gives_way(
    pre_norm: bool, bug: tuple[str, ...], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """The rest of the block still runs on the kernels, in place where they do."""
    break_kernel(monkeypatch, tmp_path, *bug)
    call = ffn(5, d=16, f=24, gated=True, activation="silu", pre_norm=pre_norm)
    leaves = call.leaves()
    names = ("x", "w1", "b1", "w2", "b2", "w_gate", "b_gate", "norm_weight", "norm_bias")
    numbers = ffn_op.Numbers(1, 1e-5, 4, pre_norm, True, 0.0, 0.0)
    y = ffn_op.forward(tuple(leaves[n] for n in names), None, numbers, 1, "triton")
    with pytest.warns(first_use.KernelMismatchWarning, match="backward N.* is WRONG on sm_80"):
        grads = call.gradients({"y": y}, leaves)
    near({"y": y.detach(), **{f"d{n}": g for n, g in grads.items()}}, call)
    wrong = [v for v in first_use.verdicts() if not v.ok]
    assert wrong
    assert all("backward" in v.variant for v in wrong)
