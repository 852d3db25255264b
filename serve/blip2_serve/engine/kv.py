"""Which row of the KV belongs to whom. A row holds one token's keys and values of all layers.

This module hands out row numbers; the rows themselves are tensors of the runner's. Row 0 is never
handed out: it pads the shorter rows of a batch.
"""

from __future__ import annotations

from array import array

PADDING_ROW = 0


class KvRows:
    """Row numbers 1 .. total. Freed rows are used again first, so few rows are ever touched."""

    def __init__(self, total: int) -> None:
        self.total = total
        self._free = array("q", range(total, 0, -1))

    @property
    def free(self) -> int:
        return len(self._free)

    @property
    def used(self) -> int:
        return self.total - self.free

    def take(self, count: int) -> array[int] | None:
        """`count` rows, or None where fewer are free."""
        if count > self.free:
            return None
        split = self.free - count
        rows = self._free[split:]
        del self._free[split:]
        return rows

    def give_back(self, rows: array[int]) -> None:
        self._free.extend(rows)

    def check_integrity(self, held: list[array[int]]) -> None:
        """Every row is either free or held by exactly one sequence."""
        rows = sorted(row for group in [self._free, *held] for row in group)
        if rows != list(range(1, self.total + 1)):
            raise AssertionError("KV rows were lost or are held twice")
