"""SASS as nvdisasm -c prints it: instructions, basic blocks, loops, and the plain trip of a loop.

A loop is a natural loop (Aho et al.): a branch back to a block that dominates it, and every block
that reaches the branch without passing that one. ptxas rotates loops and moves cold blocks out of
line, so line numbers alone do not tell what lies inside.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Set
from dataclasses import dataclass, field
from functools import cached_property

_SECTION = re.compile(r"^\s*\.section\s+\.text\.([^,\s]+)", re.MULTILINE)
_LABEL = re.compile(r"^(\.L[\w.$]*):\s*$")
_INSTRUCTION = re.compile(
    r"^\s*/\*(?P<at>[0-9a-f]{4,})\*/\s+\{?\s*(?:@(?P<guard>!?U?P\w+)\s+)?(?P<op>[A-Z][\w.]*)(?P<rest>[^;]*);"
)
_TARGET = re.compile(r"`\((\.L[\w.$]*)\)")
_REGISTERS = re.compile(r"SHI_REGISTERS=(\d+)")
Worth = tuple[float, ...]  # compared element by element, the first one first
_ENDS = ("EXIT", "RET", "BRX", "JMP", "JMX", "BPT", "KILL")


class SassError(ValueError):
    """Text that cannot be read as the SASS of a kernel; the message says what and where."""


@dataclass(frozen=True)
class Instruction:
    at: int  # byte offset in the function
    guard: str  # "P0", "!UP3", "" = always
    op: str  # with its modifiers: "HMMA.16816.F32.BF16"
    operands: str

    @property
    def never(self) -> bool:
        """Guarded by !PT: issued, and does nothing."""
        return self.guard in ("!PT", "!UPT")


@dataclass
class Block:
    """Instructions that run one after the other."""

    index: int
    instructions: list[Instruction] = field(default_factory=list)
    after: list[int] = field(default_factory=list)  # indices of the blocks that may follow


@dataclass(frozen=True)
class Loop:
    head: int
    blocks: frozenset[int]
    tails: frozenset[int]  # blocks that branch back to the head


@dataclass(eq=False)  # hashed by identity: what is read of one is kept
class Function:
    name: str
    registers: int | None  # a thread; None where the text does not say
    blocks: list[Block]

    @property
    def instructions(self) -> Iterable[Instruction]:
        return (i for block in self.blocks for i in block.instructions)

    @cached_property
    def loops(self) -> list[Loop]:
        """Natural loops, those with one head merged; inner ones first."""
        above = _dominators(self.blocks)
        before: dict[int, list[int]] = {b.index: [] for b in self.blocks}
        for block in self.blocks:
            for index in block.after:
                before[index].append(block.index)
        found: dict[int, tuple[set[int], set[int]]] = {}
        for block in self.blocks:
            for head in block.after:
                if head not in above.get(block.index, ()):
                    continue
                body, tails = found.setdefault(head, ({head}, set()))
                tails.add(block.index)
                todo = [block.index]
                while todo:
                    index = todo.pop()
                    if index not in body and index in above:
                        body.add(index)
                        todo += before[index]
        loops = [Loop(h, frozenset(b), frozenset(t)) for h, (b, t) in found.items()]
        return sorted(loops, key=lambda loop: (len(loop.blocks), loop.head))

    def innermost(self, hot: Callable[[Instruction], bool]) -> list[Loop]:
        """Loops with a hot instruction that no inner loop of theirs has as well."""
        with_hot = [
            loop
            for loop in self.loops
            if any(hot(i) for b in loop.blocks for i in self.blocks[b].instructions)
        ]
        return [x for x in with_hot if not any(y.blocks < x.blocks for y in with_hot)]

    def plain_trip(self, loop: Loop, worth: Callable[[Block], Worth]) -> list[Block]:
        """The blocks of one trip, in order: of all ways from the head back to it the one whose sum
        of `worth` is largest. A block that only an edge of the problem needs (a mask, a tail) is
        not worth its instructions; one with the next tile's loads is.

        Inner loops count once: `innermost` left in them nothing that is hot.
        """
        return self._way(loop.head, loop.blocks, loop.tails, worth)

    def plain_run(self, worth: Callable[[Block], Worth]) -> list[Block]:
        """The same from entry to exit, every loop entered for one trip."""
        ends = {b.index for b in self.blocks if not b.after or _exits(b)}
        return self._way(0, {b.index for b in self.blocks}, ends, worth)

    def _way(
        self, start: int, inside: Set[int], ends: Set[int], worth: Callable[[Block], Worth]
    ) -> list[Block]:
        best: dict[int, tuple[Worth, int | None]] = {}
        for index in self._postorder(start, inside):
            own = worth(self.blocks[index])
            ways: list[tuple[Worth, int | None]] = [(own, None)] if index in ends else []
            for after in self.blocks[index].after:
                # What is not done yet is reached by a branch back: a loop's end.
                if after in best and after != start:
                    rest = best[after][0]
                    ways.append((tuple(a + b for a, b in zip(own, rest, strict=True)), after))
            if ways:
                best[index] = max(ways, key=lambda way: way[0])
        if start not in best:
            raise SassError(f"{self.name}: no way through from block {start}")
        path, at = [], start
        while at is not None:
            path.append(self.blocks[at])
            at = best[at][1]  # type: ignore[assignment]
        return path

    def _postorder(self, start: int, inside: Set[int]) -> list[int]:
        """Blocks that `start` reaches, each after those that follow it; branches back aside."""
        order, seen = [], {start}
        stack = [(start, iter(self.blocks[start].after))]
        while stack:
            index, rest = stack[-1]
            for after in rest:
                if after in inside and after not in seen:
                    seen.add(after)
                    stack.append((after, iter(self.blocks[after].after)))
                    break
            else:
                order.append(index)
                stack.pop()
        return order


def functions(text: str) -> dict[str, Function]:
    """Every kernel of a disassembly, by its mangled name."""
    parts = _SECTION.split(text)  # what comes before, then name and text in turn
    return {name: function(name, part) for name, part in zip(parts[1::2], parts[2::2], strict=True)}


def function(name: str, text: str) -> Function:
    """One kernel, from the lines of its section."""
    items = list(_items(text))
    if not any(isinstance(item, Instruction) for item in items):
        raise SassError(f"{name}: no instruction")
    blocks, labels = _cut(items)
    for block in blocks:
        _connect(name, block, blocks, labels)
    registers = _REGISTERS.search(text)
    return Function(name, int(registers[1]) if registers else None, blocks)


def _items(text: str) -> Iterable[Instruction | str]:
    """Instructions and labels, in order."""
    for line in text.splitlines():
        if label := _LABEL.match(line):
            yield label[1]
        elif m := _INSTRUCTION.match(line):
            yield Instruction(int(m["at"], 16), m["guard"] or "", m["op"], m["rest"].strip())
        elif re.match(r"\s*/\*[0-9a-f]{4,}\*/\s+\S", line):
            raise SassError(f"not an instruction: {line.strip()}")


def _cut(items: list[Instruction | str]) -> tuple[list[Block], dict[str, int]]:
    blocks, labels = [Block(0)], {}
    for item in items:
        last = blocks[-1].instructions
        if last and (isinstance(item, str) or _leaves(last[-1])):
            blocks.append(Block(len(blocks)))
        if isinstance(item, str):
            labels[item] = blocks[-1].index
        else:
            blocks[-1].instructions.append(item)
    return blocks, labels


def _leaves(x: Instruction) -> bool:
    return x.op.split(".")[0] in (*_ENDS, "BRA")


def _exits(block: Block) -> bool:
    return bool(block.instructions) and block.instructions[-1].op.split(".")[0] == "EXIT"


def _connect(name: str, block: Block, blocks: list[Block], labels: dict[str, int]) -> None:
    last = block.instructions[-1] if block.instructions else None
    falls = True
    if last is not None and last.op.split(".")[0] == "BRA":
        target = _TARGET.search(last.operands)
        if target is None or target[1] not in labels:
            raise SassError(f"{name}: {last.op} {last.operands} leads to no label")
        block.after.append(labels[target[1]])
        # "BRA.DIV ~URZ, `(...)`" and "BRA.U UP0, `(...)`" carry their condition as an operand.
        falls = bool(last.guard) or last.operands.strip() != target[0]
    elif last is not None and _leaves(last):
        falls = bool(last.guard)
    if falls and block.index + 1 < len(blocks):
        block.after.append(block.index + 1)


def _dominators(blocks: list[Block]) -> dict[int, set[int]]:
    """Of every block that can be reached, the blocks that no way to it avoids."""
    before: dict[int, list[int]] = {}
    reached, todo = {0}, [0]
    while todo:
        index = todo.pop()
        for after in blocks[index].after:
            before.setdefault(after, []).append(index)
            if after not in reached:
                reached.add(after)
                todo.append(after)
    above = {i: set(reached) for i in reached}
    above[0] = {0}
    changed = True
    while changed:
        changed = False
        for index in sorted(reached - {0}):
            now = set.intersection(*(above[b] for b in before[index])) | {index}
            if now != above[index]:
                above[index], changed = now, True
    return above
