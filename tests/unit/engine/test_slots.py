"""Slots hold each decoding sequence's keys and values, whoever comes and goes."""

from __future__ import annotations

from array import array
from random import Random
from unittest.mock import patch

import torch

from blip2_serve.engine.sequence import Chunk, Sequence
from blip2_serve.engine.slots import DecodeSlots
from support.requests import make_request

SLOTS, COLUMNS, ROWS = 6, 40, 9_000
LAYERS, HEADS, DIM = 2, 3, 4


class Decoding:
    """Slots, and a KV in which every row holds its own number."""

    def __init__(self) -> None:
        shape = (LAYERS, SLOTS, HEADS, COLUMNS, DIM)
        self.slots = DecodeSlots(shape, torch.float32, torch.device("cpu"))
        numbers = torch.arange(ROWS, dtype=torch.float32)[:, None, None]
        signs = torch.tensor([1.0, -1.0])[:, None, None, None]  # of keys and values
        self.rows = (numbers * signs).expand(LAYERS, 2, ROWS, HEADS, DIM).contiguous()
        self._free = iter(range(1, ROWS))

    def sequence(self, length: int) -> Sequence:
        table = array("q", (next(self._free) for _ in range(length)))
        return Sequence(make_request("", [1] * (length - 1)), table=table, output=[1])

    def step(self, sequences: list[Sequence]) -> list[Chunk]:
        """One step as the runner takes it; every slot must hold its sequence's rows."""
        placed = self.slots.place([last(s) for s in sequences], self.rows)
        for slot, chunk in enumerate(placed):
            expected = self.rows[:, :, list(chunk.sequence.table)].transpose(2, 3)
            self.slots.kv[:, :, slot, :, chunk.start] = expected[:, :, :, -1]
            held = self.slots.kv[:, :, slot]
            torch.testing.assert_close(held[:, :, :, : chunk.end], expected)
            assert torch.isfinite(held).all()
        for s in sequences:
            s.output.append(1)
            s.table.append(next(self._free))
        return placed


def last(sequence: Sequence) -> Chunk:
    return Chunk(sequence, sequence.length - 1, sequence.length)


def test_every_sequence_finds_its_own_keys_and_values_in_any_company() -> None:
    random = Random(0)
    decoding = Decoding()
    running: list[Sequence] = []
    for _ in range(150):
        if running and random.random() < 0.4:
            running.remove(random.choice(running))
        running = [s for s in running if s.length < COLUMNS]
        while len(running) < SLOTS and random.random() < 0.4:
            running.append(decoding.sequence(random.choice([2, 3, 9, 20])))
        random.shuffle(running)
        some = running[: random.randint(0, len(running))]
        assert len(decoding.step(some)) == len(some)


def test_a_sequence_that_grows_stays_where_it_is() -> None:
    decoding = Decoding()
    sequences = [decoding.sequence(10), decoding.sequence(12)]
    decoding.step(sequences)
    with patch.object(DecodeSlots, "_fill") as fill:
        for _ in range(20):
            decoding.step(sequences)
    fill.assert_not_called()


def test_what_has_no_place_is_left_to_others() -> None:
    decoding = Decoding()
    too_long, prompt = decoding.sequence(COLUMNS + 1), decoding.sequence(3)
    prompt.output.clear()
    assert decoding.step([too_long]) == []
    assert decoding.slots.place([Chunk(prompt, 1, 2)], decoding.rows) == []
    many = [decoding.sequence(5) for _ in range(SLOTS + 2)]
    assert [c.sequence for c in decoding.step(many)] == many[:SLOTS]


def test_cuda_graphs_find_the_slots_where_they_were() -> None:
    decoding = Decoding()
    before = decoding.slots.kv
    for length in (5, COLUMNS - 1, 3):
        decoding.step([decoding.sequence(length)])
    assert decoding.slots.kv is before
    assert before.shape == (LAYERS, 2, SLOTS, HEADS, COLUMNS, DIM)
