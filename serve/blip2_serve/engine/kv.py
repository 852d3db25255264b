"""Which row of the KV belongs to whom. A row holds one token's keys and values of all layers.

This module hands out row numbers; the rows themselves are tensors of the runner's. A row may have
several holders: requests with a common beginning, and the tree that keeps beginnings for later. It
is free again when the last of them gives it back. Rows are numbered from 1.
"""

from __future__ import annotations

from array import array
from collections import Counter
from collections.abc import Iterable


class KvRows:
    """Row numbers 1 .. total. Freed rows are used again first, so few rows are ever touched."""

    def __init__(self, total: int) -> None:
        self.total = total
        self._free = array("q", range(total, 0, -1))
        self._holders = array("l", bytes(array("l").itemsize * (total + 1)))

    @property
    def free(self) -> int:
        return len(self._free)

    @property
    def used(self) -> int:
        return self.total - self.free

    def take(self, count: int) -> array[int] | None:
        """`count` rows with one holder each, or None where fewer are free."""
        if count > self.free:
            return None
        split = self.free - count
        rows = array("q", sorted(self._free[split:]))  # neighbours are read faster
        del self._free[split:]
        self.share(rows)
        return rows

    def share(self, rows: Iterable[int]) -> None:
        """Adds a holder to each of the rows."""
        for row in rows:
            self._holders[row] += 1

    def is_shared(self, row: int) -> bool:
        """Whether a row has more than one holder."""
        return self._holders[row] > 1

    def give_back(self, rows: Iterable[int]) -> None:
        """Takes a holder from each of the rows."""
        for row in rows:
            self._holders[row] -= 1
            if not self._holders[row]:
                self._free.append(row)

    def check_integrity(self, held: Iterable[Iterable[int]]) -> None:
        """Asserts that `held`, the rows of every holder, is just what was taken and shared."""
        holders = Counter(row for rows in held for row in rows)
        free = sorted(self._free)
        if free != [row for row in range(1, self.total + 1) if row not in holders]:
            raise AssertionError("KV rows were lost, or are free and held")
        if any(self._holders[row] != holders[row] for row in range(self.total + 1)):
            raise AssertionError("KV rows have another number of holders than was counted")
