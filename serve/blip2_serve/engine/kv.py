"""Which row of the KV belongs to whom. A row holds one token's keys and values of all layers.

This module hands out row numbers; the rows themselves are tensors of the runner's. A row may be
held by several requests with a common beginning, and kept by the tree that keeps beginnings for
later. It is free once no request holds it and the tree does not keep it. Rows count from 1.
"""

from __future__ import annotations

from array import array
from collections import Counter
from collections.abc import Iterable


class KvRows:
    """Row numbers 1 .. total. Freed rows are used again first, so few rows are ever touched."""

    def __init__(self, total: int) -> None:
        self.total = total
        self.evictable = 0  # rows that are kept and held by no request
        self._free = array("q", range(total, 0, -1))
        self._holders = array("l", bytes(array("l").itemsize * (total + 1)))  # requests, by row
        self._kept = bytearray(total + 1)  # by row: 1 if the tree keeps it

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
        """Adds a holder to each of the rows, which are held or kept already."""
        for row in rows:
            if self._kept[row] and not self._holders[row]:
                self.evictable -= 1
            self._holders[row] += 1

    def is_held(self, row: int) -> bool:
        """Whether any request holds the row."""
        return self._holders[row] > 0

    def give_back(self, rows: Iterable[int]) -> None:
        """Takes a holder from each of the rows."""
        for row in rows:
            self._holders[row] -= 1
            if self._holders[row]:
                continue
            if self._kept[row]:
                self.evictable += 1
            else:
                self._free.append(row)

    def keep(self, rows: Iterable[int]) -> None:
        """Keeps rows that a request holds beyond its end."""
        for row in rows:
            self._kept[row] = 1

    def forget(self, rows: Iterable[int]) -> None:
        """Keeps the rows no longer; those that no request holds are free."""
        for row in rows:
            self._kept[row] = 0
            if not self._holders[row]:
                self.evictable -= 1
                self._free.append(row)

    def check_integrity(
        self, held: Iterable[Iterable[int]], kept: Iterable[Iterable[int]] = ()
    ) -> None:
        """Asserts that `held`, the rows of each request, and `kept` account for every row."""
        holders = Counter(row for rows in held for row in rows)
        keeping = Counter(row for rows in kept for row in rows)
        rows = range(self.total + 1)
        if sorted(self._free) != [row for row in rows[1:] if not holders[row] | keeping[row]]:
            raise AssertionError("KV rows were lost, or are free and in use")
        if any(self._holders[row] != holders[row] for row in rows):
            raise AssertionError("KV rows have another number of holders than was counted")
        if any(self._kept[row] != keeping[row] for row in rows):
            raise AssertionError("KV rows that are kept are not those of the tree")
        if self.evictable != sum(not holders[row] for row in keeping):
            raise AssertionError("KV rows that can be evicted were miscounted")
