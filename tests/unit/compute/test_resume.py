"""Resumed answers of the shipped model equal those that were never interrupted."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import blip2_serve.demo
from blip2_serve.compute.assembly import EngineLimits, assemble
from blip2_serve.compute.base import Device
from blip2_serve.engine.engine import Engine
from blip2_serve.engine.sequence import Request
from blip2_serve.model.checkpoint import (
    eos_token_ids,
    longest_sequence,
    open_checkpoint,
    shortest_sequence,
)
from blip2_serve.model.decoder import OptDecoder
from blip2_serve.model.tokenizer import Tokenizer
from blip2_serve.types import SamplingParams, TokenEvent, TokenLogprob
from support.device import DEVICE
from support.resuming import Sent, check_last, cuts, rest

CHECKPOINT = Path(blip2_serve.demo.__file__).parent / "checkpoint"


class Ahead(Device):
    """Computes at once, but has the engine launch each step before it takes the last one's."""

    asynchronous = True


class Model:
    """The shipped decoder and tokenizer; every run has an engine of its own."""

    def __init__(self) -> None:
        self.checkpoint = open_checkpoint(str(CHECKPOINT))
        self.decoder = OptDecoder.load(self.checkpoint, DEVICE, torch.float32)
        self.tokenizer = Tokenizer(self.checkpoint.folder, self.checkpoint.config)
        queries = self.checkpoint.config.num_query_tokens
        hidden = self.decoder.config.hidden_size
        self.image = torch.randn(queries, hidden, generator=torch.Generator().manual_seed(5))

    def engine(self, device: Device) -> Engine:
        return assemble(
            self.decoder,
            device,
            EngineLimits(max_num_seqs=4, max_num_batched_tokens=24, kv_slots=400),
            pad_to=1,
            min_len=shortest_sequence(self.checkpoint.config),
            max_len=longest_sequence(self.checkpoint.config, 128),
            decode=self.tokenizer.decode,
            eos_token_ids=eos_token_ids(self.checkpoint.config),
        )

    def run(self, device: Device, sent: Sent, **params: Any) -> list[TokenEvent]:
        prompt = self.tokenizer.prompt_ids("Question: what is in the picture? Answer:")
        engine = self.engine(device)
        own = {"max_tokens": 14, "ignore_eos": True, **params}
        engine.add(Request("a", prompt, self.image, "image", SamplingParams(**own), sent))
        events = []
        while engine.has_work:
            result = engine.step()
            assert not result.failures
            events += [event for _, event in result.events]
            engine.check_integrity()
        engine.check_idle()
        check_last(events)
        return events


@pytest.fixture(scope="module")
def model() -> Model:
    return Model()


HOT = {"temperature": 2.0, "seed": 7}  # all kinds of tokens, halves of characters among them

CASES = [
    pytest.param({"max_tokens": 30}, id="greedy"),
    pytest.param({"ignore_eos": False, "min_tokens": 9, "max_tokens": 30}, id="min_tokens"),
    pytest.param({**HOT, "top_p": 0.95, "top_logprobs": 2}, id="top_p"),
    pytest.param({**HOT, "top_k": 40, "min_p": 0.001}, id="top_k"),
    pytest.param({**HOT, "n": 3, "max_tokens": 8, "top_logprobs": 0}, id="samples"),
    pytest.param({"repetition_penalty": 1.4}, id="repetition penalty"),
    pytest.param({"frequency_penalty": 0.9, "presence_penalty": -0.4}, id="other penalties"),
    pytest.param({**HOT, "logit_bias": ((9, 3.0), (40, -9.0))}, id="biases"),
    pytest.param({"num_beams": 3, "max_tokens": 20, "top_logprobs": 1}, id="the best beam"),
    pytest.param({"num_beams": 3, "n": 2, "ignore_eos": False}, id="the two best beams"),
]


@pytest.mark.parametrize("device", [Device(DEVICE), Ahead(DEVICE)], ids=["at once", "ahead"])
@pytest.mark.parametrize("params", CASES)
def test_resumed_answers_equal_undisturbed_ones(
    model: Model, device: Device, params: dict[str, Any]
) -> None:
    n = params.get("n", 1)
    whole = model.run(device, (), **params)
    for sent, counts in cuts(whole, n, most=30):
        resumed = model.run(device, sent, **params)
        check_equal(rest(resumed, [0] * n), rest(whole, counts))


@pytest.mark.parametrize("device", [Device(DEVICE), Ahead(DEVICE)], ids=["at once", "ahead"])
def test_a_stop_string_and_characters_may_lie_across_the_cut(model: Model, device: Device) -> None:
    whole = model.run(device, (), **HOT, max_tokens=40)
    text = "".join(event.text for event in whole)
    assert any(not event.text for event in whole), "no character of several tokens"
    stop = text[len(text) // 2 :][:12]
    stopped = model.run(device, (), **HOT, max_tokens=40, stop=(stop,))
    assert stopped[-1].finish_reason == "stop"
    for events, params in ((whole, {}), (stopped, {"stop": (stop,)})):
        for sent, counts in cuts(events, 1):
            resumed = model.run(device, sent, **HOT, max_tokens=40, **params)
            check_equal(rest(resumed, [0]), rest(events, counts))


def check_equal(actual: dict[int, TokenEvent], expected: dict[int, TokenEvent]) -> None:
    """A chunk of several tokens rounds differently from as many single ones, in the last bits."""
    assert bare(actual) == bare(expected)
    for index, event in actual.items():
        torch.testing.assert_close(
            values(event.logprobs), values(expected[index].logprobs), atol=1e-4, rtol=1e-4
        )


def bare(answers: dict[int, TokenEvent]) -> dict[int, TokenEvent]:
    """Without log-probabilities, and which of the answers is the last to end."""
    return {i: replace(event, logprobs=(), last=False) for i, event in answers.items()}


def values(logprobs: tuple[TokenLogprob, ...]) -> Tensor:
    return torch.tensor([[line.logprob, *(top.logprob for top in line.top)] for line in logprobs])
