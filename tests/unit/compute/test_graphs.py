"""Padding and choice of recorded steps. Only where there is a GPU are they really recorded."""

from __future__ import annotations

from array import array
from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor
from transformers import OPTConfig

from blip2_serve.compute.base import Device
from blip2_serve.compute.cuda.capture import cuda_capture
from blip2_serve.compute.cuda.graphs import DecodeGraphs, batch_sizes
from blip2_serve.compute.runner import Runner
from blip2_serve.engine.sequence import Chunk, Sequence
from blip2_serve.model.decoder import OptDecoder
from support.capturing import Capturing, run_again
from support.device import DEVICE
from support.requests import make_request

VOCABULARY = 50
SLOTS = 64


@pytest.mark.parametrize(
    ("sequences", "sizes"),
    [
        pytest.param(1, [1], id="one"),
        pytest.param(2, [1, 2], id="two"),
        pytest.param(8, [1, 2, 4, 8], id="eight"),
        pytest.param(20, [1, 2, 4, 8, 16, 20], id="no multiple of eight"),
    ],
)
def test_batch_sizes_are_close_and_end_with_all_sequences(sequences: int, sizes: list[int]) -> None:
    assert batch_sizes(sequences) == sizes


class Captured:
    """Graphs of a step that only notes what it is given."""

    def __init__(self, max_num_seqs: int, max_len: int) -> None:
        self.calls: list[list[list[int]]] = []
        self.graphs = DecodeGraphs(
            self.step,
            Device(torch.device("cpu")),
            max_num_seqs=max_num_seqs,
            max_len=max_len,
            vocabulary=2,
            capture=run_again,
        )

    def step(self, inputs: Tensor) -> Tensor:
        self.calls.append(inputs.tolist())
        return inputs[:, :2].float()

    def run(self, *lines: list[int]) -> list[list[float]]:
        self.calls.clear()
        logits: list[list[float]] = self.graphs.run(torch.tensor(lines)).tolist()
        return logits


def test_every_size_is_recorded_at_the_start_the_largest_first() -> None:
    captured = Captured(max_num_seqs=4, max_len=9)
    assert [len(lines) for lines in captured.calls] == [4, 2, 1]


def test_a_step_is_padded_to_the_next_size() -> None:
    captured = Captured(max_num_seqs=8, max_len=3)

    logits = captured.run([5, 1, 30, 31], [6, 1, 32, 33], [7, 0, 34, 0])

    lines = [[5, 1, 30, 31, 0], [6, 1, 32, 33, 0], [7, 0, 34, 0, 0], [0, 0, 0, 0, 0]]
    assert captured.calls == [lines]
    assert logits == [[5, 1], [6, 1], [7, 0]]


def test_a_step_that_fits_is_not_padded() -> None:
    captured = Captured(max_num_seqs=2, max_len=1)
    captured.run([5, 0, 3], [6, 0, 1])
    assert captured.calls == [[[5, 0, 3], [6, 0, 1]]]


def test_what_an_earlier_step_left_is_no_padding() -> None:
    captured = Captured(max_num_seqs=4, max_len=2)
    captured.run(*[[9, 1, 8, 8]] * 4)
    captured.run([5, 0, 3], [6, 0, 1], [7, 0, 2])
    (lines,) = captured.calls
    assert [line[:3] for line in lines] == [[5, 0, 3], [6, 0, 1], [7, 0, 2], [0, 0, 0]]


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
    decoder = OptDecoder(config).eval().requires_grad_(False).to(DEVICE)
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
    sequence = Sequence(request, slots=array("q", range(first, first + 16)))
    runner.run([Chunk(sequence, 0, length)])
    sequence.output.append(number)
    return sequence


def last(sequence: Sequence) -> Chunk:
    return Chunk(sequence, sequence.length - 1, sequence.length)


def make_runner(decoder: OptDecoder, device: Device) -> Runner:
    return Runner(decoder, device, SLOTS, max_num_seqs=4, max_len=16)


def test_a_padded_step_has_the_logits_of_one_without_padding(decoder: OptDecoder) -> None:
    logits = []
    for device in (Capturing(DEVICE), Device(DEVICE)):
        runner = make_runner(decoder, device)
        sequences = [begun(runner, number, length) for number, length in enumerate((5, 9, 3))]
        for token in (11, 12):
            logits.append(runner.run([last(s) for s in sequences]).clone())
            for s in sequences:
                s.output.append(token)
    padded, plain = logits[:2], logits[2:]
    torch.testing.assert_close(padded, plain, atol=1e-5, rtol=1e-5)


def test_padding_touches_no_row_but_the_first(decoder: OptDecoder) -> None:
    runner = make_runner(decoder, Capturing(DEVICE))
    sequences = [begun(runner, number, length) for number, length in enumerate((5, 9, 3))]
    before = runner._kv.clone()

    runner.run([last(s) for s in sequences])

    # As bits: rows that were never written may hold anything, NaN too.
    changed = (runner._kv.view(torch.int32) != before.view(torch.int32)).any(-1).any(3).any(0)
    own = {s.slots[s.length - 1] for s in sequences}
    assert {*changed.any(0).nonzero()[:, 0].tolist()} <= {0, *own}


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

    replay = cuda_capture(priority=-1)(lambda: calls.append("step"))
    replay()

    own = "stream of priority -1"
    assert calls == [
        f"{own} waits for stream of priority 0",
        *(f"> {own}", "step", f"< {own}"),
        *(f"> pool, {own}", "step", f"< pool, {own}"),
        "replay",
    ]
