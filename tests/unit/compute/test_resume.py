"""Resumed answers of the shipped model equal those that were never interrupted."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from blip2_serve.compute.base import Device
from blip2_serve.types import TokenEvent, TokenLogprob
from support.device import DEVICE
from support.resuming import cuts, rest
from support.shipped import Ahead, Model


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
    for sent, counts in cuts(whole, n, most=12):
        resumed = model.run(device, sent, **params)
        check_equal(rest(resumed, [0] * n), rest(whole, counts))


@pytest.mark.parametrize("device", [Device(DEVICE), Ahead(DEVICE)], ids=["at once", "ahead"])
def test_a_stop_string_and_characters_may_lie_across_the_cut(model: Model, device: Device) -> None:
    wild = {"temperature": 20.0, "seed": 8, "max_tokens": 14}
    whole = model.run(device, (), **wild)
    assert sum(not event.text for event in whole) > 3, "no characters of several tokens"
    text = "".join(event.text for event in whole)
    stop = text[len(text) // 2 :][:12]
    stopped = model.run(device, (), **wild, stop=(stop,))
    assert stopped[-1].finish_reason == "stop"
    for events, params in ((whole, {}), (stopped, {"stop": (stop,)})):
        for sent, counts in cuts(events, 1):
            resumed = model.run(device, sent, **wild, **params)
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
