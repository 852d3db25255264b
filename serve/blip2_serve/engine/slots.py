"""Who owns each KV slot. A slot holds one token's keys and values of every layer.

This module hands out slot numbers; the tensors behind them belong to the runner. Several requests
with a common prefix can hold the same slot, and the prefix tree can cache it for later requests. A
slot is free when no request holds it and it is not cached. Slots are numbered from 1: slot 0 is
scratch space for padding.
"""

from __future__ import annotations

from array import array
from collections import Counter
from collections.abc import Iterable


class KvSlots:
    """Slots 1 to `total`. Freed slots are reused first, which keeps the touched memory small."""

    def __init__(self, total: int) -> None:
        self.total = total
        self.evictable = 0  # slots that are cached and that no request holds
        self._free = array("q", range(total, 0, -1))
        self._holders = array("l", bytes(array("l").itemsize * (total + 1)))  # requests per slot
        self._cached = bytearray(total + 1)  # 1 for each slot that is cached

    @property
    def free(self) -> int:
        return len(self._free)

    @property
    def used(self) -> int:
        return self.total - self.free

    def allocate(self, count: int) -> array[int] | None:
        """Returns `count` slots with one holder each, or None if fewer are free."""
        if count > self.free:
            return None
        split = self.free - count
        slots = array("q", sorted(self._free[split:]))  # adjacent slots are read faster
        del self._free[split:]
        self.share(slots)
        return slots

    def share(self, slots: Iterable[int]) -> None:
        """Adds a holder to each of the slots, which must be held or cached already."""
        for slot in slots:
            if self._cached[slot] and not self._holders[slot]:
                self.evictable -= 1
            self._holders[slot] += 1

    def is_held(self, slot: int) -> bool:
        """Whether any request holds the slot."""
        return self._holders[slot] > 0

    def release(self, slots: Iterable[int]) -> None:
        """Removes a holder from each of the slots."""
        for slot in slots:
            self._holders[slot] -= 1
            if self._holders[slot]:
                continue
            if self._cached[slot]:
                self.evictable += 1
            else:
                self._free.append(slot)

    def cache(self, slots: Iterable[int]) -> None:
        """Keeps slots, each held by a request, beyond the end of that request."""
        for slot in slots:
            self._cached[slot] = 1

    def uncache(self, slots: Iterable[int]) -> None:
        """Stops caching the slots; those that no request holds become free."""
        for slot in slots:
            self._cached[slot] = 0
            if not self._holders[slot]:
                self.evictable -= 1
                self._free.append(slot)

    def check_integrity(
        self, held: Iterable[Iterable[int]], cached: Iterable[Iterable[int]] = ()
    ) -> None:
        """Asserts that slots `held` by each request and those `cached` account for all slots."""
        holders = Counter(slot for slots in held for slot in slots)
        caching = Counter(slot for slots in cached for slot in slots)
        slots = range(self.total + 1)
        if sorted(self._free) != [slot for slot in slots[1:] if not holders[slot] | caching[slot]]:
            raise AssertionError("KV slots were lost, or are both free and in use")
        if any(self._holders[slot] != holders[slot] for slot in slots):
            raise AssertionError("the holders of a KV slot were miscounted")
        if any(self._cached[slot] != caching[slot] for slot in slots):
            raise AssertionError("the cached KV slots are not those of the prefix tree")
        if self.evictable != sum(not holders[slot] for slot in caching):
            raise AssertionError("the evictable KV slots were miscounted")
