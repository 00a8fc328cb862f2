"""A GPU kernel checks itself the first time it runs on a machine.

No GPU was at hand when the kernels were written. So the first call of a kernel variant (op,
architecture, dtype, head_dim, features) on a machine is preceded by one on a small fixed input,
which is compared with the reference in fp64. The verdict is kept in memory and in a file, by
package, torch, Triton, driver and architecture. A variant that is wrong is disabled with one loud
warning; ``auto`` takes plain PyTorch instead, an explicit backend raises.

``FASTATTN_FIRST_USE=0`` switches the checks off (kernels found wrong before stay disabled).
``FASTATTN_CACHE_DIR`` moves the file (default: $XDG_CACHE_HOME/fastattn or ~/.cache/fastattn).
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import json
import os
import tempfile
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch


class KernelMismatchWarning(UserWarning):
    """A kernel computed something else than the reference and is not used on this machine."""


@dataclass(frozen=True)
class Verdict:
    """What the check of one kernel variant found."""

    op: str
    architecture: str
    variant: str
    ok: bool
    detail: str
    milliseconds: float


_lock = threading.RLock()
_verdicts: dict[str, Verdict] | None = None  # None: the file was not read yet
_local = threading.local()
generation = 0  # grows when verdicts are dropped: what callers remember of them is void then


def enabled() -> bool:
    """Whether a variant without a verdict is checked before it runs."""
    return os.environ.get("FASTATTN_FIRST_USE", "1").lower() not in ("0", "false", "off", "no")


def architecture(device: torch.device) -> str | None:
    """``sm_90``, ``gfx942``, ...; None where nothing needs a check (the CPU's kernels are tested on
    CPUs, Triton's interpreter is no hardware)."""
    if device.type != "cuda":
        return None
    return _architecture(device.index if device.index is not None else torch.cuda.current_device())


@lru_cache
def _architecture(index: int) -> str:
    if torch.version.hip:
        name: str = torch.cuda.get_device_properties(index).gcnArchName
        return name.split(":")[0]
    major, minor = torch.cuda.get_device_capability(index)
    return f"sm_{major}{minor}"


def trusted(
    op: str, arch: str, variant: str, check: Callable[[], str | None], *, may_check: bool = True
) -> bool:
    """Whether a kernel variant may run on this machine.

    Args:
        op: the op's name. arch: from :func:`architecture`. variant: what tells its kernels apart.
        check: runs the small input; returns what is wrong, or None. Called once a machine; an
            exception counts as wrong.
        may_check: False where a check cannot run now (a graph is being captured): an unknown
            variant is then let through, unchecked, and checked another time.
    """
    key = f"{op}|{arch}|{variant}"
    with _lock:
        verdicts = _load()
        known = verdicts.get(key)
        if known is not None:
            return known.ok
        if not may_check or not enabled() or is_checking():
            return True
        _local.checking = True  # what the check itself calls is not checked again
        start = time.perf_counter()
        try:
            detail = check()
        except Exception as error:
            detail = f"{type(error).__name__}: {error}"
        finally:
            _local.checking = False
        took = (time.perf_counter() - start) * 1e3
        verdict = Verdict(op, arch, variant, detail is None, detail or "", round(took, 1))
        verdicts[key] = verdict
        _save(verdicts)
    if not verdict.ok:
        _warn(verdict)
    return verdict.ok


def verdicts() -> list[Verdict]:
    """Every verdict on this machine, in the order of their names."""
    with _lock:
        return [v for _, v in sorted(_load().items())]


def forget() -> None:
    """Drop all verdicts, in memory and on disk: the next use checks anew."""
    global _verdicts, generation
    with _lock:
        _verdicts = {}
        generation += 1
        with contextlib.suppress(OSError, RuntimeError):
            cache_file().unlink(missing_ok=True)


@contextlib.contextmanager
def explicit() -> Iterator[None]:
    """The caller named this backend: a disabled kernel raises instead of giving way."""
    former = getattr(_local, "explicit", False)
    _local.explicit = True
    try:
        yield
    finally:
        _local.explicit = former


def is_checking() -> bool:
    """Whether this thread is inside a check."""
    return getattr(_local, "checking", False)


def is_explicit() -> bool:
    return getattr(_local, "explicit", False)


def environment() -> dict[str, str]:
    """What a verdict depends on beside the variant."""
    found = {"torch": torch.__version__, "cuda": str(torch.version.cuda or torch.version.hip)}
    for package in ("fastattn", "triton"):
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = "none"
    driver = Path("/proc/driver/nvidia/version")
    with contextlib.suppress(OSError, IndexError):
        found["driver"] = driver.read_text().splitlines()[0]
    return found


def cache_file() -> Path:
    base = os.environ.get("FASTATTN_CACHE_DIR")
    if base:
        return Path(base) / "first_use.json"
    cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(cache) / "fastattn" / "first_use.json"


# A file that is missing, damaged or of another shape. RuntimeError: brackets nested without an end,
# or a user without a home.
_UNREADABLE = (OSError, ValueError, TypeError, KeyError, AttributeError, RuntimeError)


def _load() -> dict[str, Verdict]:
    global _verdicts
    if _verdicts is None:
        _verdicts = {}
        # What cannot be read, or is of another environment, says nothing.
        with contextlib.suppress(*_UNREADABLE):
            saved: dict[str, Any] = json.loads(cache_file().read_text())
            if saved["environment"] == environment():
                _verdicts = {key: Verdict(**v) for key, v in saved["verdicts"].items()}
    return _verdicts


def _save(verdicts: dict[str, Verdict]) -> None:
    text = json.dumps(
        {"environment": environment(), "verdicts": {k: asdict(v) for k, v in verdicts.items()}},
        indent=1, sort_keys=True,
    )  # fmt: skip
    # A home that cannot be written to costs a check a process, no more.
    with contextlib.suppress(OSError, RuntimeError):
        path = cache_file()
        path.parent.mkdir(parents=True, exist_ok=True)
        # Whole or not at all, for two processes may write at once.
        handle, name = tempfile.mkstemp(dir=path.parent, prefix=path.name)
        with os.fdopen(handle, "w") as file:
            file.write(text)
        Path(name).replace(path)


def _warn(verdict: Verdict) -> None:
    where = ", ".join(f"{k} {v}" for k, v in environment().items())
    warnings.warn(
        f"fastattn::{verdict.op}: the kernel for {verdict.variant} is WRONG on "
        f"{verdict.architecture}: {verdict.detail}. It is disabled on this machine; backend='auto' "
        "runs plain PyTorch instead, which is right but slow. Please report this text as an issue "
        f"({where}; `fastattn doctor` has the whole table).",
        KernelMismatchWarning,
        stacklevel=4,
    )
