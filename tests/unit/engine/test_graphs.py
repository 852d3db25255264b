"""Padding and choice of recorded steps. Nothing is recorded here: that takes a GPU."""

from __future__ import annotations

from array import array
from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor
from transformers import OPTConfig

from blip2_serve.engine.graphs import (
    DecodeGraphs,
    batch_sizes,
    cuda_recorder,
    no_recorder,
    widths,
)
from blip2_serve.engine.runner import Runner
from blip2_serve.engine.sequence import Chunk, Sequence
from blip2_serve.model.opt import OptDecoder
from support.requests import make_request

VOCABULARY = 50
ROWS = 64


@pytest.mark.parametrize(
    ("slots", "sizes"),
    [
        pytest.param(1, [1], id="one"),
        pytest.param(2, [1, 2], id="two"),
        pytest.param(8, [1, 2, 4, 8], id="eight"),
        pytest.param(20, [1, 2, 4, 8, 16, 20], id="no multiple of eight"),
    ],
)
def test_batch_sizes_are_close_and_end_with_all_slots(slots: int, sizes: list[int]) -> None:
    assert batch_sizes(slots) == sizes


@pytest.mark.parametrize(
    ("columns", "expected"),
    [
        pytest.param(13, [13], id="fewer than the least"),
        pytest.param(64, [64], id="the least"),
        pytest.param(300, [64, 128, 256, 300], id="no power of two"),
        pytest.param(512, [64, 128, 256, 512], id="a power of two"),
    ],
)
def test_widths_double_and_end_with_all_columns(columns: int, expected: list[int]) -> None:
    assert widths(columns) == expected


class Recorded:
    """Graphs of a step that only notes what it is given."""

    def __init__(self, slots: int, columns: int) -> None:
        self.calls: list[tuple[list[list[int]], int]] = []
        self.graphs = DecodeGraphs(
            self.step,
            slots=slots,
            columns=columns,
            vocabulary=2,
            device=torch.device("cpu"),
            record=no_recorder,
        )

    def step(self, ids: Tensor, starts: Tensor, rows: Tensor, width: int) -> Tensor:
        self.calls.append(([ids.tolist(), starts.tolist(), rows.tolist()], width))
        return torch.stack([ids, starts], 1).float()


def test_every_size_and_width_is_recorded_at_the_start_the_largest_first() -> None:
    recorded = Recorded(slots=4, columns=128)

    shapes = [(len(inputs[0]), width) for inputs, width in recorded.calls]
    assert shapes == [(4, 128), (4, 64), (2, 128), (2, 64), (1, 128), (1, 64)]


def test_a_step_is_padded_to_the_next_size_and_width() -> None:
    recorded = Recorded(slots=8, columns=128)
    recorded.calls.clear()

    logits = recorded.graphs.run([5, 6, 7], [40, 70, 9], [3, 1, 2], width=71)

    assert recorded.calls == [([[5, 6, 7, 0], [40, 70, 9, 0], [3, 1, 2, 0]], 128)]
    assert logits.tolist() == [[5, 40], [6, 70], [7, 9]]


def test_a_step_that_fits_is_not_padded() -> None:
    recorded = Recorded(slots=2, columns=64)
    recorded.calls.clear()

    recorded.graphs.run([5, 6], [40, 63], [3, 1], width=64)

    assert recorded.calls == [([[5, 6], [40, 63], [3, 1]], 64)]


def test_padding_of_an_earlier_step_does_not_stay() -> None:
    recorded = Recorded(slots=4, columns=64)
    recorded.graphs.run([9, 9, 9, 9], [1, 2, 3, 4], [1, 2, 3, 4], width=5)
    recorded.calls.clear()

    recorded.graphs.run([5, 6, 7], [1, 2, 3], [4, 5, 6], width=4)

    assert recorded.calls == [([[5, 6, 7, 0], [1, 2, 3, 0], [4, 5, 6, 0]], 64)]


# -- with a real decoder -------------------------------------------------------------------------


@pytest.fixture(scope="module")
def decoder() -> OptDecoder:
    torch.manual_seed(0)
    config = OPTConfig(
        vocab_size=VOCABULARY,
        hidden_size=32,
        word_embed_proj_dim=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        ffn_dim=64,
        max_position_embeddings=64,
    )
    decoder = OptDecoder(config).eval().requires_grad_(False)
    for parameter in decoder.parameters():
        parameter.normal_(std=0.4)
    return decoder


def begun(runner: Runner, number: int, length: int) -> Sequence:
    """A sequence whose prompt is computed, with rows of its own and a first token."""
    first = 1 + 16 * number
    request = make_request(
        f"{number}",
        [(7 * number + i) % VOCABULARY for i in range(length)],
        image=torch.empty(0, 32),
        max_tokens=8,
    )
    sequence = Sequence(request, table=array("q", range(first, first + 16)))
    runner.run([Chunk(sequence, 0, length)])
    sequence.output.append(number)
    return sequence


def last(sequence: Sequence) -> Chunk:
    return Chunk(sequence, sequence.length - 1, sequence.length)


def make_runner(decoder: OptDecoder, gpu: bool = True) -> Runner:
    return Runner(decoder, ROWS, slots=4, columns=16, gpu=gpu)


def test_a_padded_step_has_the_logits_of_one_without_padding(decoder: OptDecoder) -> None:
    logits = []
    for gpu in (True, False):
        runner = make_runner(decoder, gpu)
        sequences = [begun(runner, number, length) for number, length in enumerate((5, 9, 3))]
        for token in (11, 12):
            logits.append(runner.run([last(s) for s in sequences]).clone())
            for s in sequences:
                s.output.append(token)
    padded, plain = logits[:2], logits[2:]
    torch.testing.assert_close(padded, plain, atol=1e-5, rtol=1e-5)


def test_padding_touches_no_row_but_the_first_and_no_slot_in_use(decoder: OptDecoder) -> None:
    runner = make_runner(decoder)
    sequences = [begun(runner, number, length) for number, length in enumerate((5, 9, 3))]
    runner.run([last(s) for s in sequences])  # all are in their slots now
    for s in sequences:
        s.output.append(12)
    before = snapshot(runner)

    runner.run([last(s) for s in sequences])

    own = [s.table[s.length - 1] for s in sequences]
    places = [s.length - 1 for s in sequences]
    changed_rows, changed_columns = changes(before, snapshot(runner))
    assert changed_rows <= {0, *own}
    assert changed_columns <= {*enumerate(places), (3, 0)}


def test_a_sequence_that_takes_a_padded_slot_reads_nothing_of_the_padding(
    decoder: OptDecoder,
) -> None:
    logits = []
    for padded_before in (True, False):
        runner = make_runner(decoder)
        sequences = [begun(runner, number, length) for number, length in enumerate((5, 9, 3, 4))]
        if padded_before:
            runner.run([last(s) for s in sequences[:3]])
        logits.append(runner.run([last(s) for s in sequences]).clone())
    torch.testing.assert_close(*logits, atol=0, rtol=0)


def snapshot(runner: Runner) -> tuple[Tensor, Tensor]:
    """Keys of all rows and of all slots."""
    assert runner._slots
    return runner._rows[:, 0].clone(), runner._slots.kv[:, 0].clone()


def changes(
    before: tuple[Tensor, Tensor], after: tuple[Tensor, Tensor]
) -> tuple[set[int], set[tuple[int, int]]]:
    """Rows, and (slot, column)s, with another key in any layer."""
    changed_rows, changed_columns = (
        # As bits: rows that were never written may hold anything, NaN too.
        (a.view(torch.int32) != b.view(torch.int32)).any(-1).any(2).any(0)
        for a, b in zip(before, after, strict=True)
    )
    return (
        {*changed_rows.nonzero()[:, 0].tolist()},
        {(slot, column) for slot, column in changed_columns.nonzero().tolist()},
    )


def test_a_step_runs_once_before_it_is_recorded_where_it_is_recorded(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Against a stand-in for torch.cuda: at least the calls are the right ones, in order."""
    calls: list[str] = []

    class Stream:
        def __init__(self, priority: int = 0) -> None:
            self.name = f"stream of priority {priority}"

        def wait_stream(self, other: Stream) -> None:
            calls.append(f"{self.name} waits for {other.name}")

    class Graph:
        def replay(self) -> None:
            calls.append("replay")

    @contextmanager
    def inside(what: str) -> Iterator[None]:
        calls.append(f"> {what}")
        yield
        calls.append(f"< {what}")

    cuda = SimpleNamespace(
        Stream=Stream,
        CUDAGraph=Graph,
        current_stream=Stream,
        graph_pool_handle=lambda: "pool",
        stream=lambda stream: inside(stream.name),
        graph=lambda _, pool, stream: inside(f"{pool}, {stream.name}"),
    )
    monkeypatch.setattr(torch, "cuda", cuda)

    replay = cuda_recorder()(lambda: calls.append("step"))
    replay()

    own = "stream of priority -1"
    assert calls == [
        f"{own} waits for stream of priority 0",
        *(f"> {own}", "step", f"< {own}"),
        *(f"> pool, {own}", "step", f"< pool, {own}"),
        "replay",
    ]
