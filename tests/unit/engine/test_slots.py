"""Slots hold each decoding sequence's keys and values, and are about as many and wide as needed."""

from __future__ import annotations

from array import array
from random import Random

import pytest
import torch
from tests.support.requests import make_request

from blip2_serve.engine.sequence import Chunk, Sequence
from blip2_serve.engine.slots import DecodeSlots

SLOTS, COLUMNS, ROWS = 8, 200, 2000
LAYERS, HEADS, DIM = 2, 3, 4


class Decoding:
    """Slots, and a KV in which every row holds its own number."""

    def __init__(self, *, fixed: bool = False) -> None:
        shape = (LAYERS, SLOTS, HEADS, COLUMNS, DIM)
        self.slots = DecodeSlots(shape, torch.float32, torch.device("cpu"), fixed=fixed)
        numbers = torch.arange(ROWS, dtype=torch.float32)[None, :, None, None]
        self.rows = numbers.expand(LAYERS, ROWS, HEADS, DIM).contiguous()
        self._free = iter(range(1, ROWS))

    def sequence(self, length: int) -> Sequence:
        table = array("q", (next(self._free) for _ in range(length)))
        return Sequence(make_request("", [1] * (length - 1)), table=table, output=[1])

    def step(self, sequences: list[Sequence]) -> None:
        """One step as the runner takes it; every slot must hold its sequence's rows."""
        chunks = [Chunk(s, s.length - 1, s.length) for s in sequences]
        placed = self.slots.place(chunks, self.rows, -self.rows)
        assert {*placed} == {*chunks}
        for slot, chunk in enumerate(placed):
            row = chunk.sequence.table[chunk.start]
            for kv, sign in ((self.slots.keys, 1), (self.slots.values, -1)):
                kv[:, slot, :, chunk.start] = sign * row
                expected = torch.tensor(chunk.sequence.table, dtype=torch.float32) * sign
                held = kv[:, slot, :, : chunk.end]
                torch.testing.assert_close(held, expected[:, None].expand_as(held))
            assert torch.isfinite(self.slots.keys[:, slot]).all()
        for s in sequences:
            s.output.append(1)
            s.table.append(next(self._free))

    @property
    def size(self) -> tuple[int, int]:
        return self.slots.keys.shape[1], self.slots.keys.shape[3]


@pytest.mark.parametrize("fixed", [False, True], ids=["as needed", "all from the start"])
def test_every_sequence_finds_its_own_keys_and_values_in_any_company(fixed: bool) -> None:
    random = Random(0)
    decoding = Decoding(fixed=fixed)
    running: list[Sequence] = []
    for _ in range(60):
        if running and random.random() < 0.4:
            running.remove(random.choice(running))
        while len(running) < SLOTS and random.random() < 0.4:
            running.append(decoding.sequence(random.choice([2, 5, 20, 60])))
        random.shuffle(running)
        decoding.step(running[: random.randint(0, len(running))])


def test_slots_are_no_more_and_not_much_wider_than_the_sequences_need() -> None:
    decoding = Decoding()
    assert decoding.size == (0, 0)
    short = decoding.sequence(10)
    decoding.step([short])
    assert decoding.size == (1, 32)
    decoding.step([short, decoding.sequence(10), decoding.sequence(30)])
    assert decoding.size == (4, 64)
    decoding.step([short, decoding.sequence(199)])
    assert decoding.size == (2, COLUMNS)
    decoding.step([short])
    assert decoding.size == (1, 32)


def test_slots_that_are_wide_enough_stay_where_they_are() -> None:
    decoding = Decoding()
    sequences = [decoding.sequence(10), decoding.sequence(12)]
    decoding.step(sequences)
    before = decoding.slots.keys
    for _ in range(15):
        decoding.step(sequences)
    assert decoding.slots.keys is before


def test_cuda_graphs_find_the_slots_where_they_were() -> None:
    decoding = Decoding(fixed=True)
    before = decoding.slots.keys
    for length in (5, 150, 3):
        decoding.step([decoding.sequence(length)])
    assert decoding.slots.keys is before
    assert decoding.size == (SLOTS, COLUMNS)
