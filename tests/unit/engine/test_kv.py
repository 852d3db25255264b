from __future__ import annotations

from array import array
from random import Random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from blip2_serve.engine.kv import KvRows


def test_every_row_but_the_padding_row_can_be_taken_once() -> None:
    kv = KvRows(5)
    rows = [*(kv.take(2) or []), *(kv.take(3) or [])]
    assert sorted(rows) == [1, 2, 3, 4, 5]
    assert 0 not in rows
    assert (kv.used, kv.free) == (5, 0)


def test_where_too_few_rows_are_free_none_is_taken() -> None:
    kv = KvRows(5)
    assert kv.take(3) is not None
    assert kv.take(3) is None
    assert (kv.used, kv.free) == (3, 2)


def test_rows_given_back_are_the_next_to_be_taken() -> None:
    kv = KvRows(100)
    rows = kv.take(7)
    assert rows is not None
    kv.give_back(rows)
    assert set(kv.take(7) or []) == set(rows)


def test_a_shared_row_is_free_once_its_last_holder_gives_it_back() -> None:
    kv = KvRows(3)
    rows = kv.take(3)
    assert rows is not None
    kv.share(rows[:2])
    kv.share(rows[:1])
    free = []
    for given_back in (rows, rows[:2], rows[:1]):
        kv.give_back(given_back)
        free.append(kv.free)
    assert free == [1, 2, 3]


def test_a_kept_row_is_free_once_it_is_forgotten_and_no_request_holds_it() -> None:
    kv = KvRows(4)
    rows = kv.take(3)
    assert rows is not None
    kv.keep(rows[:2])
    assert (kv.free, kv.evictable) == (1, 0)  # all three are held
    kv.give_back(rows)
    assert (kv.free, kv.evictable) == (2, 2)
    kv.share(rows[:1])
    assert (kv.free, kv.evictable) == (2, 1)
    kv.forget(rows[:2])
    assert (kv.free, kv.evictable) == (3, 0)
    kv.give_back(rows[:1])
    assert (kv.free, kv.evictable) == (4, 0)


@given(st.lists(st.integers(0, 6), max_size=40), st.randoms(use_true_random=False))
def test_rows_are_conserved(counts: list[int], random: Random) -> None:
    """Holders take rows of their own, share those of others, and leave in any order."""
    kv = KvRows(12)
    held: list[array[int]] = []
    for count in counts:
        if held and random.random() < 0.3:
            shared = array("q", random.choice(held)[:count])
            kv.share(shared)
            held.append(shared)
        elif rows := kv.take(count):
            held.append(rows)
        elif held:
            kv.give_back(held.pop(random.randrange(len(held))))
        kv.check_integrity(held)
        assert kv.used == len({row for rows in held for row in rows})


@pytest.mark.parametrize(
    "held",
    [
        pytest.param([], id="all holders have lost their rows"),
        pytest.param([[2, 1]], id="one of two holders has lost its row"),
        pytest.param([[2], [1, 1]], id="a row that was taken once has two holders"),
        pytest.param([[2, 1], [2, 1]], id="a row that was not shared has two holders"),
        pytest.param([[2, 1, 3], [2]], id="a holder has a row that is free too"),
        pytest.param([[2, 1, 0], [2]], id="a holder has a row that there is not"),
    ],
)
def test_wrong_books_are_noticed(held: list[list[int]]) -> None:
    kv = KvRows(4)
    rows = kv.take(2)
    assert rows is not None
    assert sorted(rows) == [1, 2]
    kv.share([2])
    kv.check_integrity([rows, [2]])
    with pytest.raises(AssertionError, match="KV rows"):
        kv.check_integrity([array("q", group) for group in held])


@pytest.mark.parametrize(
    "kept",
    [
        pytest.param([], id="a kept row is not in the tree"),
        pytest.param([[1, 2]], id="a row in the tree is not kept"),
        pytest.param([[1], [1]], id="a row is in the tree twice"),
    ],
)
def test_wrong_books_of_what_is_kept_are_noticed(kept: list[list[int]]) -> None:
    kv = KvRows(4)
    rows = kv.take(2)
    assert rows is not None
    kv.keep([1])
    kv.check_integrity([rows], [[1]])
    with pytest.raises(AssertionError, match="KV rows"):
        kv.check_integrity([rows], kept)
