"""The check before a kernel's first use, behind the stand-in driver, on kernels with a bug."""

import importlib.util
import json
import warnings
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from types import ModuleType

import pytest
import torch
from tools import Problem, featured, packed, padded, run
from torch import Tensor

import fastattn
from fastattn import first_use, reference
from fastattn.cli import doctor
from fastattn.kernels import attention as kernels
from fastattn.ops import attention_first_use
from fastattn.ops import attention_op as op
from rungs.driver import StandIn, standing_in

KERNELS = Path(kernels.__file__).parent
# Without this rescale a row's sum is wrong as soon as a later tile holds its maximum.
LOST_RESCALE = ("attention_fwd", "l = l * alpha + tl.sum(p, 1)", "l = l + tl.sum(p, 1)")
LOST_DELTA = ("attention_bwd", "ds = p * (dp - delta)", "ds = p * dp")


@pytest.fixture(autouse=True)
def gpu(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[StandIn]:
    """CPU tensors stand for those of an sm_80 that nothing is known about."""
    monkeypatch.setenv("FASTATTN_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(first_use, "architecture", lambda device: "sm_80")
    monkeypatch.setattr(first_use, "_verdicts", None)
    monkeypatch.setattr(first_use, "generation", object())
    # Several of the CPU's small tiles; a GPU's large ones need more, and there it costs nothing.
    monkeypatch.setattr(attention_first_use, "_SQ", 50)
    monkeypatch.setattr(attention_first_use, "_SK", 60)
    with standing_in(80, values=True) as stand_in:
        yield stand_in


def break_kernel(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, bug: tuple[str, str, str]
) -> None:
    name, right, wrong = bug
    text = (KERNELS / f"{name}.py").read_text()
    assert text.count(right) == 1
    file = tmp_path / f"broken_{name}.py"
    file.write_text(text.replace(right, wrong))
    spec = importlib.util.spec_from_file_location(file.stem, file)
    assert spec is not None
    assert spec.loader is not None
    module: ModuleType = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.setattr(kernels, {"attention_fwd": "fwd", "attention_bwd": "bwd"}[name], module)


def inputs(requires_grad: bool = False) -> tuple[Tensor, Tensor, Tensor]:
    q = torch.randn(1, 2, 20, 16, requires_grad=requires_grad)
    k, v = (torch.randn(1, 2, 24, 16, requires_grad=requires_grad) for _ in range(2))
    return q, k, v


def as_auto(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """What `auto` runs on a GPU (on CPU tensors it would take the CPU's kernels)."""
    shared = (*(None,) * 9, q.shape[-1] ** -0.5, 0, -1, -1, 0.0, 0.0, 0, q.shape[2], k.shape[2])
    o, _, _ = op.forward_triton(q, k, v, *shared, True)
    return o


def test_a_right_kernel_is_checked_once(gpu: StandIn, monkeypatch: pytest.MonkeyPatch) -> None:
    q, k, v = inputs()
    o = fastattn.attention(q, k, v, backend="triton")
    torch.testing.assert_close(o, reference.attention(q, k, v), rtol=1e-5, atol=1e-5)
    assert len(gpu.launches) == 2  # the check's and ours
    (verdict,) = first_use.verdicts()
    assert verdict.ok
    assert verdict.architecture == "sm_80"
    assert verdict.variant == "triton float32 D16 forward"
    fastattn.attention(q, k, v, backend="triton")
    assert len(gpu.launches) == 3
    monkeypatch.setattr(first_use, "_verdicts", None)  # as another process finds it
    fastattn.attention(q, k, v, backend="triton")
    assert len(gpu.launches) == 4


def with_mean_weights() -> Problem:
    problem = padded(b=1, h=4, hk=2, sq=20, sk=24, d=8, dropout_p=0.2, seed=3)
    return problem.with_(return_weights="mean")


PROBLEMS: dict[str, Callable[[], Problem]] = {
    "all": partial(featured, "all", b=2, h=4, hk=2, sq=20, sk=24, d=8),
    "packed": partial(packed, (13, 0, 20), (20, 3, 20), h=2, d=12, causal=True),
    "weights": with_mean_weights,
    "half": partial(featured, "bias", b=2, h=2, sq=20, sk=24, d=8, dtype=torch.float16),
    "wide_v": partial(padded, b=1, h=2, sq=20, sk=24, d=8, dv=24, causal="bottom_right"),
}


@pytest.mark.parametrize("name", PROBLEMS)
def test_features_are_checked_as_they_are_called(name: str) -> None:
    """A small call is made of whatever the user's call has; a right kernel passes."""
    run(PROBLEMS[name](), "triton")
    verdicts = first_use.verdicts()
    assert [(v.ok, v.detail) for v in verdicts] == [(True, "")] * 2
    assert ["forward" in v.variant for v in verdicts] == [False, True]


def test_a_wrong_forward_gives_way(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    break_kernel(monkeypatch, tmp_path, LOST_RESCALE)
    q, k, v = inputs()
    with pytest.warns(
        first_use.KernelMismatchWarning, match=r"triton float32 D16 forward is WRONG on sm_80"
    ):
        o = as_auto(q, k, v)
    torch.testing.assert_close(o, reference.attention(q, k, v))
    with warnings.catch_warnings():  # loud once
        warnings.simplefilter("error")
        torch.testing.assert_close(as_auto(q, k, v), reference.attention(q, k, v))
    with pytest.raises(ValueError, match="disabled for triton float32 D16 forward on sm_80"):
        fastattn.attention(q, k, v, backend="triton")
    (verdict,) = first_use.verdicts()
    assert not verdict.ok
    assert "o is off by" in verdict.detail


def test_a_wrong_backward_gives_way(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    break_kernel(monkeypatch, tmp_path, LOST_DELTA)
    leaves = inputs(requires_grad=True)
    o = as_auto(*leaves)
    do = torch.randn_like(o)
    with pytest.warns(
        first_use.KernelMismatchWarning, match="backward 7 of do is WRONG.*dq is off by"
    ):
        grads = torch.autograd.grad(o, leaves, do)
    right = torch.autograd.grad(reference.attention(*leaves), leaves, do)
    for grad, expected in zip(grads, right, strict=True):
        torch.testing.assert_close(grad, expected)
    assert [v.ok for v in first_use.verdicts()] == [False, True]  # backward, forward


def test_an_exception_in_the_check_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: object) -> None:
        raise RuntimeError("no kernel image is available")

    with pytest.warns(first_use.KernelMismatchWarning, match="no kernel image"):
        assert not first_use.trusted("attention", "sm_80", "x", fail)  # type: ignore[arg-type]


def test_switched_off(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, gpu: StandIn) -> None:
    break_kernel(monkeypatch, tmp_path, LOST_RESCALE)
    monkeypatch.setenv("FASTATTN_FIRST_USE", "0")
    as_auto(*inputs())
    assert len(gpu.launches) == 1
    assert not first_use.verdicts()
    # What was found wrong before stays disabled.
    monkeypatch.setenv("FASTATTN_FIRST_USE", "1")
    with pytest.warns(first_use.KernelMismatchWarning):
        as_auto(*inputs())
    monkeypatch.setenv("FASTATTN_FIRST_USE", "0")
    launches = len(gpu.launches)
    as_auto(*inputs())
    assert len(gpu.launches) == launches


def test_not_while_a_graph_is_captured() -> None:
    calls: list[int] = []

    def check() -> None:
        calls.append(1)

    assert first_use.trusted("attention", "sm_80", "x", check, may_check=False)
    assert not calls
    assert not first_use.verdicts()
    assert first_use.trusted("attention", "sm_80", "x", check)
    assert calls == [1]


@pytest.mark.parametrize(
    "damage", ["{", "[]", '{"environment": {}, "verdicts": {}}', '{"verdicts": 3}', "[" * 200_000]
)
def test_a_damaged_or_foreign_file_says_nothing(
    damage: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    first_use.trusted("attention", "sm_80", "x", lambda: "wrong")
    assert not json.loads(first_use.cache_file().read_text())["verdicts"]["attention|sm_80|x"]["ok"]
    first_use.cache_file().write_text(damage)
    monkeypatch.setattr(first_use, "_verdicts", None)
    assert first_use.verdicts() == []
    assert first_use.trusted("attention", "sm_80", "x", lambda: None)


def test_another_driver_checks_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    first_use.trusted("attention", "sm_80", "x", lambda: "wrong")
    monkeypatch.setattr(first_use, "_verdicts", None)
    found = first_use.environment()
    monkeypatch.setattr(first_use, "environment", lambda: {**found, "driver": "another"})
    assert first_use.verdicts() == []


def test_a_home_that_cannot_be_written(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("FASTATTN_CACHE_DIR", str(tmp_path / "file" / "folder"))
    assert first_use.trusted("attention", "sm_80", "x", lambda: None)
    assert [v.variant for v in first_use.verdicts()] == ["x"]


def test_a_user_without_a_home(monkeypatch: pytest.MonkeyPatch) -> None:
    def none() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("FASTATTN_CACHE_DIR", raising=False)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr(Path, "home", none)
    assert first_use.trusted("attention", "sm_80", "x", lambda: None)
    assert [v.variant for v in first_use.verdicts()] == ["x"]


def test_doctor_shows_the_table() -> None:
    first_use.trusted("attention", "sm_80", "bfloat16 D64 forward", lambda: None)
    with pytest.warns(first_use.KernelMismatchWarning):
        first_use.trusted("attention", "sm_80", "bfloat16 D64 backward 7", lambda: "dq is off")
    facts = doctor.examine()
    assert [(v["variant"], v["ok"]) for v in facts["first_use"]["verdicts"]] == [
        ("bfloat16 D64 backward 7", False),
        ("bfloat16 D64 forward", True),
    ]
    console = doctor.make_console()
    with console.capture() as captured:
        doctor.render(facts, console)
    text = captured.get()
    assert "WRONG: dq is off" in text
    assert "bfloat16 D64 forward" in text
