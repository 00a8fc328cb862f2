"""The check before the first use of attention over a KV cache, under ttsem, on broken kernels."""

import importlib.util
import warnings
from collections.abc import Iterator
from pathlib import Path

import pytest
from kv_cache_tools import Call, make, table

from fastattn import first_use
from fastattn.kernels import attention_kv_cache_fwd as kernels
from fastattn.ops import attention_kv_cache as public
from fastattn.ops import attention_kv_cache_guard as guard
from rungs.semantics import Session, semantics


@pytest.fixture(autouse=True)
def gpu(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Session]:
    """CPU tensors stand for those of an sm_80 that nothing is known about."""
    monkeypatch.setenv("FASTATTN_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(first_use, "architecture", lambda device: "sm_80")
    monkeypatch.setattr(first_use, "_verdicts", None)
    monkeypatch.setattr(first_use, "generation", object())
    # Two splits of the CPU's small tiles, and one.
    monkeypatch.setattr(guard, "_CAPACITIES", (70, 30))
    with semantics() as session:
        yield session


def decode() -> Call:
    return make((17, 0), capacity=24, d=16, page_size=8, rotary=table(24, 8))


def test_a_right_kernel_is_checked_once(gpu: Session) -> None:
    decode().judge("triton")
    (verdict,) = first_use.verdicts()
    assert (verdict.op, verdict.ok, verdict.detail) == ("attention_with_kv_cache", True, "")
    assert verdict.variant == (
        "triton float32 D16 few rows paged by 8 append rotary16 gqa causal"
    )  # fmt: skip
    launches = gpu.launches
    decode().run("triton")
    assert gpu.launches == launches + 1


@pytest.mark.parametrize(
    "bug",
    [
        ("cached_attention_kernel", "i < q_len, shift + i, cos_ptr", "i < q_len, i, cos_ptr", "o"),
        ("merge_kernel", "acc = acc * alpha + tl.sum(acc_s", "acc = acc + 2 * tl.sum(acc_s", "o"),
        ("cached_attention_kernel", "k_ptr, k_at, stride_k[3], keys < total, keys, cos_ptr",
         "k_ptr, k_at, stride_k[3], keys < total, t, cos_ptr", "k_cache"),
    ],
    ids=["q_position", "merge", "append"],
)  # fmt: skip
def test_a_wrong_kernel_gives_way(
    bug: tuple[str, str, str, str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    kernel, right, wrong, what = bug
    break_kernel(monkeypatch, tmp_path, kernel, right, wrong)
    # What `auto` takes on a GPU (on CPU tensors it would take the CPU's kernels).
    monkeypatch.setattr(public, "select", lambda *args: "triton")
    with pytest.warns(first_use.KernelMismatchWarning, match=rf"WRONG on sm_80.*{what} "):
        decode().judge("auto")
    with warnings.catch_warnings():  # loud once
        warnings.simplefilter("error")
        decode().judge("auto")
    with pytest.raises(ValueError, match="backend='triton' is disabled for triton float32 D16"):
        decode().run("triton")


def break_kernel(
    monkeypatch: pytest.MonkeyPatch, folder: Path, kernel: str, right: str, wrong: str
) -> None:
    text = Path(kernels.__file__ or "").read_text()
    assert text.count(right) == 1
    file = folder / "broken.py"
    file.write_text(text.replace(right, wrong))
    spec = importlib.util.spec_from_file_location(file.stem, file)
    assert spec is not None
    assert spec.loader is not None
    broken = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(broken)
    monkeypatch.setattr(kernels, kernel, getattr(broken, kernel))
