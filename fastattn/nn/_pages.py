"""Which page holds which keys: the host's side of a paged :class:`fastattn.nn.KVCache`.

A page holds ``size`` consecutive keys of a sequence, of all layers. Pages may be shared (beams that
began alike); ``_owners`` counts the sequences of each. Keys are only ever appended, so a shared
page is copied when its first owner is about to write into it, and full pages never are.
"""

from __future__ import annotations

from collections.abc import Sequence


class Pages:
    """Tables of pages, one a sequence, and the list of free ones."""

    def __init__(self, batch: int, count: int, size: int) -> None:
        self.size, self.count = size, count
        self.tables: list[list[int]] = [[] for _ in range(batch)]
        self._owners = [0] * count
        # A stack: pages freed last are taken first, while they are still in a cache of the machine.
        self._free = list(range(count - 1, -1, -1))

    @property
    def free(self) -> int:
        """How many pages nobody owns."""
        return len(self._free)

    def extend(
        self, sequences: Sequence[int], lengths: Sequence[int], rows: Sequence[int]
    ) -> list[tuple[int, int]]:
        """Give each sequence pages for ``rows`` more keys behind its ``lengths``.

        Returns the pages to copy first, (from, to). Changes nothing and raises RuntimeError where
        there are too few.
        """
        work = []  # sequence, place of a shared page that it will write into or None, new pages
        taken: dict[int, int] = {}  # owners that a shared page loses in this call
        short = 0
        for b, length, n in zip(sequences, lengths, rows, strict=True):
            if not n:
                continue
            table, place = self.tables[b], length // self.size
            shared = None
            if place < len(table) and self._owners[table[place]] - taken.get(table[place], 0) > 1:
                taken[table[place]] = taken.get(table[place], 0) + 1
                shared = place
            new = -(-(length + n) // self.size) - len(table)
            work.append((b, shared, new))
            short += new + (shared is not None)
        if short > self.free:
            raise RuntimeError(
                f"KVCache: this step needs {short} pages of {self.size} tokens and {self.free} of "
                f"{self.count} are free: reset() the sequences that are done, or make it with "
                f"pages={self.count + short - self.free} or more"
            )
        copies = []
        for b, shared, new in work:
            table = self.tables[b]
            if shared is not None:
                page = self._take()
                copies.append((table[shared], page))
                self._drop(table[shared])
                table[shared] = page
            table += [self._take() for _ in range(new)]
        return copies

    def crop(self, sequence: int, length: int) -> bool:
        """Free what lies beyond ``length`` keys; whether there was any."""
        table = self.tables[sequence]
        keep = -(-length // self.size)
        gone = table[keep:]
        del table[keep:]
        for page in reversed(gone):
            self._drop(page)
        return bool(gone)

    def reorder(self, index: Sequence[int]) -> None:
        """Sequence b goes on from what index[b] was; pages become shared, none is copied."""
        former = self.tables
        self.tables = [list(former[i]) for i in index]
        for table in self.tables:
            for page in table:
                self._owners[page] += 1
        for table in former:
            for page in reversed(table):
                self._drop(page)

    def grow(self, count: int) -> None:
        """``count`` pages in all."""
        self._free[:0] = range(count - 1, self.count - 1, -1)
        self._owners += [0] * (count - self.count)
        self.count = count

    def _take(self) -> int:
        page = self._free.pop()
        self._owners[page] = 1
        return page

    def _drop(self, page: int) -> None:
        self._owners[page] -= 1
        if not self._owners[page]:
            self._free.append(page)


__all__ = ["Pages"]
