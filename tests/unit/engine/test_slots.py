from __future__ import annotations

from array import array
from random import Random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from blip2_serve.engine.slots import KvSlots


def test_every_row_but_the_padding_row_can_be_taken_once() -> None:
    kv = KvSlots(5)
    slots = [*(kv.allocate(2) or []), *(kv.allocate(3) or [])]
    assert sorted(slots) == [1, 2, 3, 4, 5]
    assert 0 not in slots
    assert (kv.used, kv.free) == (5, 0)


def test_where_too_few_rows_are_free_none_is_taken() -> None:
    kv = KvSlots(5)
    assert kv.allocate(3) is not None
    assert kv.allocate(3) is None
    assert (kv.used, kv.free) == (3, 2)


def test_rows_given_back_are_the_next_to_be_taken() -> None:
    kv = KvSlots(100)
    slots = kv.allocate(7)
    assert slots is not None
    kv.release(slots)
    assert set(kv.allocate(7) or []) == set(slots)


def test_a_shared_row_is_free_once_its_last_holder_gives_it_back() -> None:
    kv = KvSlots(3)
    slots = kv.allocate(3)
    assert slots is not None
    kv.share(slots[:2])
    kv.share(slots[:1])
    free = []
    for given_back in (slots, slots[:2], slots[:1]):
        kv.release(given_back)
        free.append(kv.free)
    assert free == [1, 2, 3]


def test_a_kept_row_is_free_once_it_is_forgotten_and_no_request_holds_it() -> None:
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
def test_rows_are_conserved(counts: list[int], random: Random) -> None:
    """Holders take slots of their own, share those of others, and leave in any order."""
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
        pytest.param([], id="all holders have lost their slots"),
        pytest.param([[2, 1]], id="one of two holders has lost its slot"),
        pytest.param([[2], [1, 1]], id="a slot that was taken once has two holders"),
        pytest.param([[2, 1], [2, 1]], id="a slot that was not shared has two holders"),
        pytest.param([[2, 1, 3], [2]], id="a holder has a slot that is free too"),
        pytest.param([[2, 1, 0], [2]], id="a holder has a slot that there is not"),
    ],
)
def test_wrong_books_are_noticed(held: list[list[int]]) -> None:
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
        pytest.param([], id="a cached slot is not in the tree"),
        pytest.param([[1, 2]], id="a slot in the tree is not cached"),
        pytest.param([[1], [1]], id="a slot is in the tree twice"),
    ],
)
def test_wrong_books_of_what_is_kept_are_noticed(cached: list[list[int]]) -> None:
    kv = KvSlots(4)
    slots = kv.allocate(2)
    assert slots is not None
    kv.cache([1])
    kv.check_integrity([slots], [[1]])
    with pytest.raises(AssertionError, match="KV slots"):
        kv.check_integrity([slots], cached)
