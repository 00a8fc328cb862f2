"""The package as a program: ``python -m fastattn`` and the command ``fastattn``.

Its help and its complaints about arguments need no torch, whose import takes seconds. But Python
imports a package before its ``__main__``, so there ``fastattn/__init__.py`` leaves its names out
until a command runs and calls :func:`load`.
"""

import importlib
import sys
from pathlib import Path

_loaded = False


def starting() -> bool:
    """Whether this process is the program, and no command runs yet."""
    given = sys.orig_argv
    module = given[given.index("-m") + 1 :][:1] if "-m" in given else []
    script = Path(sys.argv[0]).name if sys.argv else ""
    return not _loaded and (module == ["fastattn"] or script in ("fastattn", "fastattn.exe"))


def load() -> None:
    """Import the whole package. In any other process it is there already."""
    global _loaded
    if starting():
        _loaded = True
        importlib.reload(sys.modules["fastattn"])
