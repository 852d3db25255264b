"""The sampler's distribution is the same as transformers' with OpenAI's penalties added to it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import (
    LogitsProcessorList,
    MinNewTokensLengthLogitsProcessor,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from blip2_serve.compute.devices import open_device
from blip2_serve.compute.sampler import Sampler
from blip2_serve.engine.sequence import Sequence
from blip2_serve.types import SamplingParams
from support.device import DEVICE
from support.penalties import OpenAIPenalties
from support.requests import make_request

VOCABULARY = 50
EOS = [2, 31]
PROMPT = [4, 4, 8, 15, 16, 23, 42]
OUTPUT = [8, 3, 3]

CASES = [
    pytest.param({}, id="plain"),
    pytest.param({"temperature": 0.3}, id="low temperature"),
    pytest.param({"temperature": 2.0}, id="high temperature"),
    pytest.param({"top_k": 1}, id="top_k 1"),
    pytest.param({"top_k": 7}, id="top_k 7"),
    pytest.param({"top_k": VOCABULARY}, id="top_k of the vocabulary"),
    pytest.param({"top_k": 1000}, id="top_k beyond the vocabulary"),
    pytest.param({"top_p": 0.01}, id="tiny top_p"),
    pytest.param({"top_p": 0.5}, id="top_p one half"),
    pytest.param({"top_p": 0.999}, id="top_p near one"),
    pytest.param({"temperature": 0.7, "top_k": 20, "top_p": 0.8}, id="all three"),
    pytest.param({"min_p": 0.001}, id="tiny min_p"),
    pytest.param({"min_p": 0.3}, id="min_p 0.3"),
    pytest.param({"min_p": 1.0}, id="min_p 1"),
    pytest.param({"repetition_penalty": 1.5}, id="repetition penalised"),
    pytest.param({"repetition_penalty": 0.7}, id="repetition encouraged"),
    pytest.param({"frequency_penalty": 0.7}, id="frequency penalised"),
    pytest.param({"frequency_penalty": -1.5}, id="frequency encouraged"),
    pytest.param({"presence_penalty": 2.0}, id="presence penalised"),
    pytest.param({"presence_penalty": -0.3, "frequency_penalty": 0.3}, id="presence encouraged"),
    pytest.param({"logit_bias": ((3, 1.5), (8, -1.5), (40, 0.25))}, id="biased"),
    pytest.param(
        {"repetition_penalty": 2.0, "frequency_penalty": 0.5, "logit_bias": ((3, 2.0), (4, 2.0))},
        id="biased tokens with penalties",
    ),
    pytest.param({"logit_bias": ((11, 100.0),)}, id="one token only"),
    pytest.param({"logit_bias": ((2, 100.0), (17, 9.0)), "min_tokens": 4}, id="a biased end token"),
    pytest.param({"min_tokens": 4}, id="below min_tokens"),
    pytest.param({"min_tokens": 3}, id="at min_tokens"),
    pytest.param(
        {
            "temperature": 0.8,
            "top_k": 30,
            "top_p": 0.9,
            "min_p": 0.05,
            "repetition_penalty": 1.3,
            "min_tokens": 10,
            "frequency_penalty": 0.4,
            "presence_penalty": -0.6,
            "logit_bias": ((3, 1.0), (5, 2.0), (42, -1.0)),
        },
        id="everything",
    ),
]


def processors(params: SamplingParams) -> LogitsProcessorList:
    steps = LogitsProcessorList()
    if params.repetition_penalty != 1:
        steps.append(RepetitionPenaltyLogitsProcessor(params.repetition_penalty))
    steps.append(OpenAIPenalties(params, len(PROMPT)))
    if params.min_tokens:
        steps.append(MinNewTokensLengthLogitsProcessor(len(PROMPT), params.min_tokens, EOS))
    return steps


def warpers(params: SamplingParams) -> LogitsProcessorList:
    steps = LogitsProcessorList([TemperatureLogitsWarper(params.temperature)])
    if params.top_k:
        steps.append(TopKLogitsWarper(params.top_k))
    if params.top_p < 1:
        steps.append(TopPLogitsWarper(params.top_p))
    if params.min_p:
        steps.append(MinPLogitsWarper(params.min_p))
    return steps


def transformed(logits: Tensor, params: SamplingParams) -> Tensor:
    """Returns transformers' processed logits, before sampling; both are [vocabulary]."""
    return processors(params)(torch.tensor([PROMPT + OUTPUT]), logits[None].clone())[0]


def probabilities(logits: Tensor, params: SamplingParams) -> Tensor:
    scores = transformed(logits, params).double()[None]
    return warpers(params)(torch.tensor([PROMPT + OUTPUT]), scores)[0].softmax(-1)


def draw(logits: Tensor, params: SamplingParams, count: int) -> list[int]:
    """Chooses `count` tokens with the seeds 0, 1, ...; tests patch the random number of each."""
    sequences = [
        Sequence(make_request("a", PROMPT, **{**vars(params), "seed": seed}), output=[*OUTPUT])
        for seed in range(count)
    ]
    rows = list(range(count))
    device = open_device(str(DEVICE))
    repeated = device.upload(logits.repeat(count, 1))
    choices = Sampler(tuple(EOS), device).choose(repeated, rows, sequences)()
    return [choice.token for choice in choices]


@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.parametrize("case", CASES)
def test_every_token_has_the_same_interval_of_random_numbers(
    case: dict[str, Any], seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    logits = torch.randn(VOCABULARY, generator=torch.Generator().manual_seed(seed)) * 2
    params = SamplingParams(**{"temperature": 1.0, **case})
    expected = probabilities(logits, params)
    ends = expected.cumsum(-1)
    starts = ends - expected
    possible = (expected > 1e-8).nonzero().flatten().tolist()

    # Try both ends and the middle of every token's interval: if all are right, the intervals are
    # transformers' and cover everything.
    numbers, tokens = [], []
    for token in possible:
        start, end = starts[token].item(), ends[token].item()
        margin = (end - start) / 100
        numbers += [start + margin, (start + end) / 2, end - margin]
        tokens += [token] * 3
    monkeypatch.setattr("blip2_serve.compute.sampler.uniform", lambda seed, *_: numbers[seed])
    assert draw(logits, params, len(numbers)) == tokens


@pytest.mark.parametrize("case", CASES)
def test_token_frequencies_over_a_grid_match_transformers(
    case: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    count = 500
    logits = torch.randn(VOCABULARY, generator=torch.Generator().manual_seed(7)) * 2
    params = SamplingParams(**{"temperature": 1.0, **case})
    expected = probabilities(logits, params)
    monkeypatch.setattr("blip2_serve.compute.sampler.uniform", lambda n, *_: (n + 0.5) / count)
    tokens = torch.tensor(draw(logits, params, count))
    frequencies = torch.bincount(tokens, minlength=VOCABULARY) / count
    torch.testing.assert_close(frequencies.double(), expected, atol=1.01 / count, rtol=0)
    assert not frequencies[expected == 0].any()


@pytest.mark.parametrize("case", CASES)
def test_greedy_chooses_the_same_token_as_transformers(case: dict[str, Any]) -> None:
    drawing = ("temperature", "top_k", "top_p", "min_p")
    greedy = {key: case[key] for key in case if key not in drawing}
    params = SamplingParams(**greedy)
    for seed in range(20):
        logits = torch.randn(VOCABULARY, generator=torch.Generator().manual_seed(seed)) * 2
        logits[EOS[seed % 2]] += 3 * (seed % 3)
        assert draw(logits, params, 1) == [int(transformed(logits, params).argmax())]
