"""Every instruction the simulator accepts is executed by a unit test of its own."""

from __future__ import annotations

import re
from pathlib import Path

from .ptx.emit import Emitter

# Executed all over the place, or without a result of its own to compare.
EVERYWHERE = {"ld", "st", "mov", "bra", "exit", "ret", "cvta", "selp"}


def test_every_family_has_a_unit_test() -> None:
    here = Path(__file__).parent
    text = "\n".join(
        p.read_text() for p in here.glob("test_ptx_*.py") if p.name != Path(__file__).name
    )
    missing = [
        name
        for name in Emitter.families
        if name not in EVERYWHERE and not re.search(rf"(?:\b|\\n){name}[.;]|\"{name}\"", text)
    ]
    assert not missing
