"""What a swap did: replaced, left alone and why."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

ALREADY = "it is fused already"


@dataclass(frozen=True)
class Replaced:
    """One module that now runs fused.

    Attributes:
        name: dotted name in the model, "" for the model itself.
        cls: name of its class before the swap.
        by: what serves it now.
        kind: "attention", "layer", "feed-forward", "residual + norm", "norm", "embedding",
            "recurrent" or "cache".
    """

    name: str
    cls: str
    by: str
    kind: str = "attention"


@dataclass(frozen=True)
class Skipped:
    """One module that looks like something a swap serves and was left alone.

    Attributes:
        name: dotted name in the model, "" for the model itself.
        cls: name of its class.
        why: the reason, in a sentence.
        kind: as in :class:`Replaced`; "?" where the swap does not know the class.
    """

    name: str
    cls: str
    why: str
    kind: str = "attention"


@dataclass
class SwapReport:
    """What :func:`fastattn.swap` did.

    ``len(report)`` is the number of modules replaced, ``bool(report)`` whether there is any, and
    ``print(report)`` a table.

    Attributes:
        model: class name of the model.
        replaced: what runs fused now.
        skipped: what was left alone, and why.
        notes: everything else worth knowing.

    >>> import torch, fastattn
    >>> report = fastattn.swap(torch.nn.TransformerEncoderLayer(32, 4))
    >>> len(report), report.count("attention"), report.replaced[0].by
    (4, 1, 'fastattn.nn.TransformerEncoderLayer')
    """

    model: str
    replaced: list[Replaced] = field(default_factory=list)
    skipped: list[Skipped] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    @property
    def fused_before(self) -> int:
        """How many modules were fused before the call."""
        return sum(s.why == ALREADY for s in self.skipped)

    def __len__(self) -> int:
        return len(self.replaced)

    def __bool__(self) -> bool:
        return bool(self.replaced)

    def count(self, kind: str) -> int:
        """How many modules of a kind were replaced."""
        return sum(r.kind == kind for r in self.replaced)

    def __str__(self) -> str:
        replaced = _grouped((r.name, r.cls, r.by) for r in self.replaced)
        skipped = _grouped((s.name, s.cls, f"left alone: {s.why}") for s in self.skipped)
        rows = [("module", "class", "now / why not"), *replaced, *skipped]
        head = f"fastattn.swap({self.model}): {len(self)} replaced, {len(self.skipped)} left alone"
        if not self:
            head += " -- NOTHING WAS REPLACED" + (", it is fused already" * bool(self.fused_before))
        lines = [head]
        if len(rows) > 1:
            widths = [max(len(row[i]) for row in rows) for i in (0, 1)]
            cells = [f"{a:<{widths[0]}}  {b:<{widths[1]}}  {c}" for a, b, c in rows]
            rule = "-" * min(100, max(len(line) for line in cells))
            lines += [cells[0], rule, *cells[1:]]
        lines += [f"note: {note}" for note in self.notes]
        return "\n".join(lines)


def _grouped(rows: Iterable[tuple[str, str, str]]) -> list[tuple[str, str, str]]:
    """One row for modules that differ in a number alone: ``layers.* (12)``."""
    groups: dict[tuple[str, str, str], list[str]] = {}
    for name, cls, text in rows:
        pattern = ".".join("*" if part.isdecimal() else part for part in name.split("."))
        groups.setdefault((pattern, cls, text), []).append(name or "(model)")
    return [
        (names[0] if len(names) == 1 else f"{pattern} ({len(names)})", cls, text)
        for (pattern, cls, text), names in groups.items()
    ]
