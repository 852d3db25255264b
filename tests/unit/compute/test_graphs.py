"""Padding and sizes of captured steps; `run_again` stands in for CUDA graphs."""

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
        pytest.param(20, [1, 2, 4, 8, 16, 20], id="not a multiple of eight"),
    ],
)
def test_batch_sizes_grow_and_end_with_max_num_seqs(sequences: int, sizes: list[int]) -> None:
    assert batch_sizes(sequences) == sizes


class Captured:
    """Graphs of a step that only records its inputs."""

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

    def run(self, *rows: list[int]) -> list[list[float]]:
        self.calls.clear()
        logits: list[list[float]] = self.graphs.run(torch.tensor(rows)).tolist()
        return logits


def test_every_size_is_captured_up_front_largest_first() -> None:
    captured = Captured(max_num_seqs=4, max_len=9)
    assert [len(rows) for rows in captured.calls] == [4, 2, 1]


def test_a_step_is_padded_to_the_next_size() -> None:
    captured = Captured(max_num_seqs=8, max_len=3)

    logits = captured.run([5, 1, 30, 31], [6, 1, 32, 33], [7, 0, 34, 0])

    rows = [[5, 1, 30, 31, 0], [6, 1, 32, 33, 0], [7, 0, 34, 0, 0], [0, 0, 0, 0, 0]]
    assert captured.calls == [rows]
    assert logits == [[5, 1], [6, 1], [7, 0]]


def test_a_step_that_fits_is_not_padded() -> None:
    captured = Captured(max_num_seqs=2, max_len=1)
    captured.run([5, 0, 3], [6, 0, 1])
    assert captured.calls == [[[5, 0, 3], [6, 0, 1]]]


def test_padding_rows_are_cleared() -> None:
    captured = Captured(max_num_seqs=4, max_len=2)
    captured.run(*[[9, 1, 8, 8]] * 4)
    captured.run([5, 0, 3], [6, 0, 1], [7, 0, 2])
    (rows,) = captured.calls
    assert [row[:3] for row in rows] == [[5, 0, 3], [6, 0, 1], [7, 0, 2], [0, 0, 0]]


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


def prefilled(runner: Runner, number: int, length: int) -> Sequence:
    """Returns a sequence with its own slots, a computed prompt and a first token."""
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


def last_token(sequence: Sequence) -> Chunk:
    return Chunk(sequence, sequence.length - 1, sequence.length)


def make_runner(decoder: OptDecoder, device: Device) -> Runner:
    return Runner(decoder, device, SLOTS, max_num_seqs=4, max_len=16)


def test_padding_does_not_change_logits(decoder: OptDecoder) -> None:
    logits = []
    for device in (Capturing(DEVICE), Device(DEVICE)):
        runner = make_runner(decoder, device)
        sequences = [prefilled(runner, number, length) for number, length in enumerate((5, 9, 3))]
        for token in (11, 12):
            logits.append(runner.run([last_token(s) for s in sequences]).clone())
            for s in sequences:
                s.output.append(token)
    padded, plain = logits[:2], logits[2:]
    torch.testing.assert_close(padded, plain, atol=1e-5, rtol=1e-5)


def test_padding_only_writes_to_slot_0(decoder: OptDecoder) -> None:
    runner = make_runner(decoder, Capturing(DEVICE))
    sequences = [prefilled(runner, number, length) for number, length in enumerate((5, 9, 3))]
    before = runner._kv.clone()

    runner.run([last_token(s) for s in sequences])

    # Compared as bits, because slots that were never written may contain NaN.
    changed = (runner._kv.view(torch.int32) != before.view(torch.int32)).any(-1).any(3).any(0)
    own = {s.slots[s.length - 1] for s in sequences}
    assert {*changed.any(0).nonzero()[:, 0].tolist()} <= {0, *own}


def test_a_step_runs_once_on_the_capture_stream_before_capture(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Uses a fake torch.cuda, which records the calls in order."""
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
