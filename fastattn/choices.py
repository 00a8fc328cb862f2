"""What ``fastattn.tune`` found on this machine, and how ``auto`` reads it.

A choice is a backend for a class of calls: op, device, dtype, training or not, features, widths as
they are, and sizes (batch, lengths, rows) rounded up to a power of two. The order is: an explicit
backend, a choice, the table in ``backends.py``.

Choices lie in a folder, ``FASTATTN_TUNE_CACHE`` or ``fastattn`` in the user's cache folder, in JSON
files that are written once and never changed. A writer adds a file with all that it knows, and then
removes the files that it had read: whatever the order of two writers, what either found is in some
file, and no lock is needed. A file's name begins with a digest of hardware and versions, so a new
torch or another machine on a shared home starts without choices.

Compiled graphs take the table: a graph that depended on what lies on a disk would have to be
compiled again when that changes.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import stat
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch

from fastattn.backends import _C_ERROR, can_serve, cpu_isa

FORMAT = 1
STOCK = "torch"  # torch's own op, where it computes the same
_CHOICES = ("cpu", "triton", "cuda", STOCK)


class Call(NamedTuple):
    """What a choice depends on.

    Attributes:
        device: its type.
        plain: torch's own op would compute the same, gradients included.
        sizes: rounded up to a power of two in the class. fixed: taken as they are.
        width: the head_dim, or the columns, that limits GPU kernels.
    """

    device: str
    dtype: torch.dtype
    training: bool
    plain: bool
    sizes: tuple[int, ...]
    fixed: tuple[Any, ...]
    width: int = 0


class Known(NamedTuple):
    """The choices for a thread count.

    Attributes:
        entries: class of calls -> {"backend": name, "usual": the table's, "time": when it was
            measured, "seconds": {name: median}}.
        ops: those with a choice other than the table's.
        memo: what :func:`pick` found, by op and key.
    """

    entries: dict[str, dict[str, Any]]
    ops: frozenset[str]
    memo: dict[tuple[str, tuple[Any, ...]], str | None]


# By thread count, as far as they were read; of _ANY where nobody has stored anything.
_known: dict[int, Known] = {}
_ANY = 0
_MEMO = 4096
# What fastattn.tune listens with while it looks for calls.
observer: Callable[[str, Call], None] | None = None


def wanted(op: str, backend: str) -> bool:
    """Whether a call has to say what it is like: it is ``auto``'s and some class of the op has a
    choice other than the table's, or torch's own op was named."""
    if backend != "auto":
        return backend == STOCK
    if torch.compiler.is_compiling():
        return False
    return op in _now().ops or observer is not None


def _now() -> Known:
    """The choices for the thread count of this moment."""
    return _known.get(_ANY) or _known.get(torch.get_num_threads()) or load()


def pick(op: str, backend: str, key: tuple[Any, ...], describe: Callable[[], Call]) -> str | None:
    """The backend of a call for which :func:`wanted` holds; None = as the table says.

    Args:
        key: tells calls apart at least as finely as the class, and costs little to make: a choice
            is looked up in every call.
        describe: what the call is like; asked once a key.

    Raises:
        ValueError: torch's own op was named, and would not compute the same.
    """
    if backend == STOCK:
        if not describe().plain:
            raise ValueError(
                f"fastattn::{op}: backend='torch' cannot serve this call: torch's own op does not "
                "take these arguments, or does not compute the same (see fastattn.tune)"
            )
        return STOCK
    if observer is not None:
        observer(op, describe())
    known = _now()
    try:
        return known.memo[op, key]
    except TypeError:  # symbolic sizes have no hash, and no class
        return None
    except KeyError:
        if len(known.memo) >= _MEMO:  # of a server that sees any length
            known.memo.clear()
        known.memo[op, key] = chosen = _of_class(op, describe(), known)
        return chosen


def _of_class(op: str, call: Call, known: Known) -> str | None:
    entry = known.entries.get(name_of(op, call))
    if entry is None:
        return None
    chosen: str = entry["backend"]
    if chosen == STOCK:
        return STOCK if call.plain else None
    served = can_serve(op, chosen, call.device, call.dtype, call.width)
    return chosen if served else None


def name_of(op: str, call: Call) -> str:
    """The class of a call, for the file and for people.

    >>> name_of("layer_norm", Call("cpu", torch.float32, False, True, (100,), (384,)))
    'layer_norm cpu float32 inference 128 384'
    """
    sizes = "x".join(str(round_up(n)) for n in call.sizes)
    fixed = " ".join(map(_text, call.fixed))
    mode = "training" if call.training else "inference"
    return f"{op} {call.device} {str(call.dtype).removeprefix('torch.')} {mode} {sizes} {fixed}"


def _text(x: Any) -> str:
    """Flags as + and -, what belongs together in one word."""
    if isinstance(x, bool):
        return "+" if x else "-"
    if isinstance(x, tuple):
        return ("" if all(isinstance(y, bool) for y in x) else ",").join(map(_text, x))
    return str(x)


def round_up(n: int) -> int:
    """The next power of two."""
    return 1 << (n - 1).bit_length() if n > 1 else n


def folder() -> Path:
    """Where choices lie: FASTATTN_TUNE_CACHE, else ``fastattn`` in XDG_CACHE_HOME or ~/.cache."""
    named = os.environ.get("FASTATTN_TUNE_CACHE")
    if named:
        return Path(named).expanduser()
    cache = os.environ.get("XDG_CACHE_HOME")
    return (Path(cache) if cache else Path.home() / ".cache") / "fastattn"


def machine() -> dict[str, Any]:
    """Hardware and versions that a choice holds for."""
    found: dict[str, Any] = {
        "cpu": cpu_model(), "threads": torch.get_num_threads(), "torch": torch.__version__,
        "fastattn": sys.modules["fastattn"].__version__, "gpu": None,
    }  # fmt: skip
    if not _C_ERROR:
        found["isa"] = cpu_isa()
    if torch.cuda.is_available():
        found["gpu"] = torch.cuda.get_device_name()
    return found


def cpu_model() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def _digest(of: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(of, sort_keys=True).encode()).hexdigest()[:12]


def load() -> Known:
    """Read the choices of this machine for its thread count. Called by the first ``auto``."""
    threads = torch.get_num_threads()
    files, entries, _ = _read()
    changed = (n for n, entry in entries.items() if entry["backend"] != entry.get("usual"))
    known = Known(entries, frozenset(name.partition(" ")[0] for name in changed), {})
    _known[threads if files else _ANY] = known
    return known


def _read(storing: bool = False) -> tuple[bool, dict[str, dict[str, Any]], list[Path]]:
    """Whether anybody stored anything, the choices of this machine, and the files that they are
    from; one warning for all that is wrong, but for other machines' choices while storing some for
    this one."""
    missing: set[Path] = set()
    while True:
        files = _listed()
        if not files:
            return False, {}, []
        here = machine()
        mine = [f for f in files if f.name.startswith(f"tune-{_digest(here)}-")]
        entries, read, wrong, gone = _collect(mine, here)
        # A writer has what was in a file that is gone in a newer one. No name is used twice: what
        # is listed again and is not there is a link to nothing.
        if gone <= missing:
            break
        missing |= gone
    wrong += [f"{file}: it leads to no file" for file in sorted(gone)]
    if wrong:
        text = "; ".join(wrong)
        warnings.warn(f"fastattn ignores what `fastattn tune` stored in {text}", stacklevel=2)
    elif not mine and not storing:
        warnings.warn(
            f"fastattn ignores the choices in {folder()}: `fastattn tune` made them for another "
            "machine, thread count or version; run it again here",
            stacklevel=2,
        )
    return True, entries, read


def _listed() -> list[Path]:
    try:
        return sorted(folder().glob("tune-*.json"))
    except (OSError, RuntimeError):  # no home
        return []


def _collect(
    files: list[Path], here: dict[str, Any]
) -> tuple[dict[str, dict[str, Any]], list[Path], list[str], set[Path]]:
    """The newest choices in the files, which were read, what is wrong with others, which are not
    there."""
    entries: dict[str, dict[str, Any]] = {}
    read, wrong, gone = [], [], set()
    for file in files:
        try:
            found = _parse(_text_of(file), here)
        except FileNotFoundError:
            gone.add(file)
            continue
        except (OSError, ValueError) as error:
            wrong.append(f"{file}: {error}")
            continue
        read.append(file)
        for name, entry in found.items():
            if name not in entries or entries[name]["time"] < entry["time"]:
                entries[name] = entry
    return entries, read, wrong, gone


def _text_of(file: Path) -> str:
    if not stat.S_ISREG(file.stat().st_mode):  # reading a pipe would wait for its writer
        raise ValueError("not a file")
    return file.read_text(encoding="utf-8")


def _parse(text: str, here: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """The choices in a file; ValueError names what is wrong with it."""
    try:
        stored = json.loads(text)
    except (ValueError, RecursionError):  # brackets nested without an end
        raise ValueError("not JSON") from None
    if not isinstance(stored, dict) or stored.get("format") != FORMAT:
        raise ValueError(f"not of format {FORMAT}")
    if stored.get("machine") != here:
        raise ValueError("of another machine or version")
    choices = stored.get("choices")
    if not isinstance(choices, dict):
        raise ValueError("no choices in it")
    for name, entry in choices.items():
        good = isinstance(entry, dict) and isinstance(entry.get("time"), (int, float))
        if not good or entry.get("backend") not in _CHOICES:
            raise ValueError(f"a choice that is none: {name!r}")
    return choices


def ready() -> None:
    """Whether :func:`store` can write, for who is about to measure for minutes.

    Raises:
        OSError: it cannot.
    """
    target = folder()
    target.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryFile(dir=target):
        pass


def store(found: dict[str, dict[str, Any]]) -> Path:
    """Add choices to those of this machine, and let ``auto`` of this process read all anew.

    Args:
        found: {class: {"backend": name, "usual": the table's, "seconds": {name: median}}}.

    Returns:
        The file that has them all now.

    Raises:
        OSError: the folder cannot be written to.
    """
    now = time.time()
    target = folder()
    target.mkdir(parents=True, exist_ok=True)
    _, known, read = _read(storing=True)
    known |= {name: {**entry, "time": now} for name, entry in found.items()}
    here = machine()
    text = json.dumps({"format": FORMAT, "machine": here, "choices": known}, indent=1)
    handle, temporary = tempfile.mkstemp(dir=target, suffix=".part")
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(text)
        # The random part of the temporary name makes the final one unique.
        unique = Path(temporary).stem
        path = target / f"tune-{_digest(here)}-{unique}.json"
        os.replace(temporary, path)  # noqa: PTH105  atomic: readers see all of it or nothing
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise
    for old in read:  # all of it is in the new file
        old.unlink(missing_ok=True)
    forget()
    load()
    return path


def forget() -> None:
    """Let the next ``auto`` read the choices anew."""
    _known.clear()
