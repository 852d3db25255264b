"""Slots hold each decoding sequence's keys and values; a step reads little more than it needs."""

from __future__ import annotations

from array import array
from random import Random
from unittest.mock import patch

import pytest
import torch
from tests.support.requests import make_request

from blip2_serve.engine.sequence import Chunk, Sequence
from blip2_serve.engine.slots import Block, DecodeSlots

SLOTS, COLUMNS, ROWS = 8, 500, 40_000  # blocks begin at 0, 96, 192 and 384
LAYERS, HEADS, DIM = 2, 3, 4


class Decoding:
    """Slots, and a KV in which every row holds its own number."""

    def __init__(self, *, fixed: bool = False) -> None:
        shape = (LAYERS, SLOTS, HEADS, COLUMNS, DIM)
        self.slots = DecodeSlots(shape, torch.float32, torch.device("cpu"), fixed=fixed)
        numbers = torch.arange(ROWS, dtype=torch.float32)[None, :, None, None, None]
        signs = torch.tensor([1.0, -1.0])[:, None, None]  # of keys and values
        self.rows = (numbers * signs).expand(LAYERS, ROWS, 2, HEADS, DIM).contiguous()
        self._free = iter(range(1, ROWS))

    def sequence(self, length: int) -> Sequence:
        table = array("q", (next(self._free) for _ in range(length)))
        return Sequence(make_request("", [1] * (length - 1)), table=table, output=[1])

    def step(self, sequences: list[Sequence]) -> None:
        """One step as the runner takes it; every slot must hold its sequence's rows."""
        chunks = [Chunk(s, s.length - 1, s.length) for s in sequences]
        placed = self.slots.place(chunks, self.rows)
        assert {*placed} == {*chunks}
        for slot, chunk in enumerate(placed):
            expected = self.rows[:, list(chunk.sequence.table)].permute(0, 2, 3, 1, 4)
            own = self.block_with(chunk.start)
            own.kv[:, :, slot, :, chunk.start - own.start] = expected[:, :, :, -1]
            needed = [block for block in self.slots.blocks if block.start < chunk.end]
            assert all(slot < block.count for block in needed)
            held = torch.cat([block.kv[:, :, slot] for block in needed], 3)
            torch.testing.assert_close(held[:, :, :, : chunk.end], expected)
            assert torch.isfinite(held).all()
        for s in sequences:
            s.output.append(1)
            s.table.append(next(self._free))

    def block_with(self, column: int) -> Block:
        return next(b for b in self.slots.blocks if b.start <= column < b.end)

    @property
    def counts(self) -> list[int]:
        """How many sequences each block is read for."""
        return [block.count for block in self.slots.blocks if block.count]


@pytest.mark.parametrize("fixed", [False, True], ids=["as needed", "all from the start"])
def test_every_sequence_finds_its_own_keys_and_values_in_any_company(fixed: bool) -> None:
    random = Random(0)
    decoding = Decoding(fixed=fixed)
    running: list[Sequence] = []
    for _ in range(150):
        if running and random.random() < 0.4:
            running.remove(random.choice(running))
        while len(running) < SLOTS and random.random() < 0.4:
            running.append(decoding.sequence(random.choice([2, 20, 90, 94, 190, 300, 382])))
        random.shuffle(running)
        decoding.step(running[: random.randint(0, len(running))])


def test_a_long_sequence_makes_short_ones_read_no_more() -> None:
    decoding = Decoding()
    short = [decoding.sequence(length) for length in (10, 95, 20)]
    decoding.step(short)
    assert decoding.counts == [3]
    decoding.step([*short, decoding.sequence(499), decoding.sequence(100)])
    assert decoding.counts == [5, 2, 1, 1]
    decoding.step(short)  # one of which has 97 tokens by now
    assert decoding.counts == [3, 1]


def test_there_are_no_more_slots_than_sequences_that_needed_them() -> None:
    decoding = Decoding()
    assert not decoding.slots.blocks
    decoding.step([decoding.sequence(10) for _ in range(3)] + [decoding.sequence(300)])
    assert [block.kv.shape[2] for block in decoding.slots.blocks if block.count] == [4, 1, 1]


def test_a_sequence_that_grows_stays_where_it_is() -> None:
    decoding = Decoding()
    sequences = [decoding.sequence(10), decoding.sequence(12)]
    decoding.step(sequences)
    before = decoding.slots.blocks[0].kv
    with patch.object(DecodeSlots, "_write") as write:
        for _ in range(80):
            decoding.step(sequences)
    write.assert_not_called()
    assert decoding.slots.blocks[0].kv is before


def test_cuda_graphs_find_the_slots_where_they_were() -> None:
    decoding = Decoding(fixed=True)
    before = decoding.slots.blocks[0].kv
    for length in (5, 450, 3):
        decoding.step([decoding.sequence(length)])
    (block,) = decoding.slots.blocks
    assert block.kv is before
    assert (block.kv.shape[2], block.end) == (SLOTS, COLUMNS)
