from __future__ import annotations

from array import array
from random import Random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from blip2_serve.engine.kv import PADDING_ROW, KvRows


def test_every_row_but_the_padding_row_can_be_taken_once() -> None:
    kv = KvRows(5)
    rows = [*(kv.take(2) or []), *(kv.take(3) or [])]
    assert sorted(rows) == [1, 2, 3, 4, 5]
    assert PADDING_ROW not in rows
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


@given(st.lists(st.integers(0, 6), max_size=40), st.randoms(use_true_random=False))
def test_rows_are_conserved(counts: list[int], random: Random) -> None:
    kv = KvRows(12)
    held: list[array[int]] = []
    for count in counts:
        if rows := kv.take(count):
            held.append(rows)
        elif held:
            kv.give_back(held.pop(random.randrange(len(held))))
        kv.check_integrity(held)
        assert kv.used == sum(map(len, held))


@pytest.mark.parametrize(
    "held",
    [
        pytest.param([], id="a sequence has lost its rows"),
        pytest.param([[4, 3], [3]], id="two sequences hold the same row"),
        pytest.param([[4, 3, 2]], id="a sequence holds a row that is free too"),
        pytest.param([[4, 3, PADDING_ROW]], id="a sequence holds the padding row"),
    ],
)
def test_wrong_books_are_noticed(held: list[list[int]]) -> None:
    kv = KvRows(4)
    rows = kv.take(2)
    assert rows is not None
    kv.check_integrity([rows])
    with pytest.raises(AssertionError, match="KV rows"):
        kv.check_integrity([array("q", group) for group in held])
