"""The switch for value checks that would synchronise a device."""

from __future__ import annotations

_enabled = False


def debug_checks(enabled: bool = True) -> None:
    """Turn the checks of values that live on a device on or off (default: off).

    On the CPU lengths and ``cu_seqlens`` are always checked. On a CUDA device reading them back
    would synchronise, so kernels clamp them instead and stay inside their tensors; with
    ``debug_checks(True)`` they are read back and a bad value raises ``ValueError``.

    >>> import fastattn
    >>> fastattn.debug_checks(True)
    >>> fastattn.debug_checks(False)
    """
    global _enabled
    _enabled = bool(enabled)


def debug_checks_enabled() -> bool:
    return _enabled
