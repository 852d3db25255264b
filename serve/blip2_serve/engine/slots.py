"""Which slot of the KV belongs to whom. A slot holds one token's keys and values of all layers.

This module hands out slot numbers; the slots themselves are tensors of the runner's. A slot may be
held by several requests with a common beginning, and cached by the tree that keeps beginnings for
later. It is free once no request holds it and the tree does not keep it. Slots count from 1.
"""

from __future__ import annotations

from array import array
from collections import Counter
from collections.abc import Iterable


class KvSlots:
    """Row numbers 1 .. total. Freed slots are used again first, so few slots are ever touched."""

    def __init__(self, total: int) -> None:
        self.total = total
        self.evictable = 0  # slots that are cached and held by no request
        self._free = array("q", range(total, 0, -1))
        self._holders = array("l", bytes(array("l").itemsize * (total + 1)))  # requests, by slot
        self._cached = bytearray(total + 1)  # by slot: 1 if the tree keeps it

    @property
    def free(self) -> int:
        return len(self._free)

    @property
    def used(self) -> int:
        return self.total - self.free

    def allocate(self, count: int) -> array[int] | None:
        """`count` slots with one holder each, or None where fewer are free."""
        if count > self.free:
            return None
        split = self.free - count
        slots = array("q", sorted(self._free[split:]))  # neighbours are read faster
        del self._free[split:]
        self.share(slots)
        return slots

    def share(self, slots: Iterable[int]) -> None:
        """Adds a holder to each of the slots, which are held or cached already."""
        for slot in slots:
            if self._cached[slot] and not self._holders[slot]:
                self.evictable -= 1
            self._holders[slot] += 1

    def is_held(self, slot: int) -> bool:
        """Whether any request holds the slot."""
        return self._holders[slot] > 0

    def release(self, slots: Iterable[int]) -> None:
        """Takes a holder from each of the slots."""
        for slot in slots:
            self._holders[slot] -= 1
            if self._holders[slot]:
                continue
            if self._cached[slot]:
                self.evictable += 1
            else:
                self._free.append(slot)

    def cache(self, slots: Iterable[int]) -> None:
        """Keeps slots that a request holds beyond its end."""
        for slot in slots:
            self._cached[slot] = 1

    def uncache(self, slots: Iterable[int]) -> None:
        """Keeps the slots no longer; those that no request holds are free."""
        for slot in slots:
            self._cached[slot] = 0
            if not self._holders[slot]:
                self.evictable -= 1
                self._free.append(slot)

    def check_integrity(
        self, held: Iterable[Iterable[int]], cached: Iterable[Iterable[int]] = ()
    ) -> None:
        """Asserts that `held`, the slots of each request, and `cached` account for every slot."""
        holders = Counter(slot for slots in held for slot in slots)
        caching = Counter(slot for slots in cached for slot in slots)
        slots = range(self.total + 1)
        if sorted(self._free) != [slot for slot in slots[1:] if not holders[slot] | caching[slot]]:
            raise AssertionError("KV slots were lost, or are free and in use")
        if any(self._holders[slot] != holders[slot] for slot in slots):
            raise AssertionError("KV slots have another number of holders than was counted")
        if any(self._cached[slot] != caching[slot] for slot in slots):
            raise AssertionError("KV slots that are cached are not those of the tree")
        if self.evictable != sum(not holders[slot] for slot in caching):
            raise AssertionError("KV slots that can be evicted were miscounted")
