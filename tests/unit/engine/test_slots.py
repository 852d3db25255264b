from __future__ import annotations

from array import array
from random import Random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from blip2_serve.engine.slots import KvSlots


def test_every_slot_but_the_padding_slot_can_be_allocated_once() -> None:
    kv = KvSlots(5)
    slots = [*(kv.allocate(2) or []), *(kv.allocate(3) or [])]
    assert sorted(slots) == [1, 2, 3, 4, 5]
    assert 0 not in slots
    assert (kv.used, kv.free) == (5, 0)


def test_allocating_too_many_slots_allocates_none() -> None:
    kv = KvSlots(5)
    assert kv.allocate(3) is not None
    assert kv.allocate(3) is None
    assert (kv.used, kv.free) == (3, 2)


def test_released_slots_are_reused_first() -> None:
    kv = KvSlots(100)
    slots = kv.allocate(7)
    assert slots is not None
    kv.release(slots)
    assert set(kv.allocate(7) or []) == set(slots)


def test_a_shared_slot_is_free_once_its_last_holder_releases_it() -> None:
    kv = KvSlots(3)
    slots = kv.allocate(3)
    assert slots is not None
    kv.share(slots[:2])
    kv.share(slots[:1])
    free = []
    for released in (slots, slots[:2], slots[:1]):
        kv.release(released)
        free.append(kv.free)
    assert free == [1, 2, 3]


def test_a_cached_slot_is_free_once_it_is_uncached_and_released() -> None:
    kv = KvSlots(4)
    slots = kv.allocate(3)
    assert slots is not None
    kv.cache(slots[:2])
    assert (kv.free, kv.evictable) == (1, 0)  # all three are held
    kv.release(slots)
    assert (kv.free, kv.evictable) == (2, 2)
    kv.share(slots[:1])
    assert (kv.free, kv.evictable) == (2, 1)
    kv.uncache(slots[:2])
    assert (kv.free, kv.evictable) == (3, 0)
    kv.release(slots[:1])
    assert (kv.free, kv.evictable) == (4, 0)


@given(st.lists(st.integers(0, 6), max_size=40), st.randoms(use_true_random=False))
def test_slots_are_neither_lost_nor_duplicated(counts: list[int], random: Random) -> None:
    """Holders allocate slots, share those of others, and release them in any order."""
    kv = KvSlots(12)
    held: list[array[int]] = []
    for count in counts:
        if held and random.random() < 0.3:
            shared = array("q", random.choice(held)[:count])
            kv.share(shared)
            held.append(shared)
        elif slots := kv.allocate(count):
            held.append(slots)
        elif held:
            kv.release(held.pop(random.randrange(len(held))))
        kv.check_integrity(held)
        assert kv.used == len({slot for slots in held for slot in slots})


@pytest.mark.parametrize(
    "held",
    [
        pytest.param([], id="all holders missing"),
        pytest.param([[2, 1]], id="one of two holders missing"),
        pytest.param([[2], [1, 1]], id="slot held twice by one holder"),
        pytest.param([[2, 1], [2, 1]], id="unshared slot with two holders"),
        pytest.param([[2, 1, 3], [2]], id="free slot with a holder"),
        pytest.param([[2, 1, 0], [2]], id="padding slot with a holder"),
    ],
)
def test_the_integrity_check_detects_wrong_holders(held: list[list[int]]) -> None:
    kv = KvSlots(4)
    slots = kv.allocate(2)
    assert slots is not None
    assert sorted(slots) == [1, 2]
    kv.share([2])
    kv.check_integrity([slots, [2]])
    with pytest.raises(AssertionError, match="KV slots"):
        kv.check_integrity([array("q", group) for group in held])


@pytest.mark.parametrize(
    "cached",
    [
        pytest.param([], id="cached slot missing from the tree"),
        pytest.param([[1, 2]], id="slot in the tree but not cached"),
        pytest.param([[1], [1]], id="slot in the tree twice"),
    ],
)
def test_the_integrity_check_detects_wrong_cached_slots(cached: list[list[int]]) -> None:
    kv = KvSlots(4)
    slots = kv.allocate(2)
    assert slots is not None
    kv.cache([1])
    kv.check_integrity([slots], [[1]])
    with pytest.raises(AssertionError, match="KV slots"):
        kv.check_integrity([slots], cached)
