from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from blip2_serve.engine.sampler import Sampler
from blip2_serve.engine.sequence import Sequence
from blip2_serve.types import SamplingParams

VOCABULARY = 20
EOS = (2, 5)


def sequence(prompt: list[int] | None = None, output: int = 0, **params: Any) -> Sequence:
    return Sequence("a", prompt or [0], None, SamplingParams(**params), output=[1] * output)


def sample(logits: Tensor, *sequences: Sequence) -> list[int]:
    return Sampler(EOS).sample(logits.clone(), list(sequences))


def random_logits(rows: int = 1, seed: int = 0) -> Tensor:
    return torch.randn(rows, VOCABULARY, generator=torch.Generator().manual_seed(seed)) * 2


def one_row(**logits: float) -> Tensor:
    """`_3=1.5`: token 3 has logit 1.5; all others have -4."""
    row = torch.full((1, VOCABULARY), -4.0)
    for token, logit in logits.items():
        row[0, int(token[1:])] = logit
    return row


def test_without_temperature_the_likeliest_token_is_taken() -> None:
    logits = random_logits(6)
    assert sample(logits, *[sequence()] * 6) == logits.argmax(-1).tolist()


def test_no_sequence_no_token() -> None:
    assert sample(torch.empty(0, VOCABULARY)) == []


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_no_end_token_comes_before_the_minimum(temperature: float) -> None:
    logits = one_row(_2=30.0, _5=29.0, _7=3.0)
    params = {"min_tokens": 3, "temperature": temperature}
    tokens = [sample(logits, sequence(output=n, **params))[0] for n in range(5)]
    assert not {*tokens[:3]} & {*EOS}
    assert {*tokens[3:]} <= {*EOS}


def test_the_repetition_penalty_counts_prompt_and_answer() -> None:
    logits = one_row(_3=2.0, _1=1.9, _4=1.5)
    assert sample(logits, sequence([3])) == [3]
    assert sample(logits, sequence([3], repetition_penalty=2.0)) == [1]
    assert sample(logits, sequence([3], output=1, repetition_penalty=2.0)) == [4]


def test_the_repetition_penalty_is_the_same_for_a_token_seen_often() -> None:
    logits = one_row(_3=2.0, _4=1.5)
    assert sample(logits, sequence([3, 3, 3], repetition_penalty=1.2)) == [3]


def test_a_negative_logit_is_penalised_downwards() -> None:
    logits = torch.full((1, VOCABULARY), -9.0)
    logits[0, 3], logits[0, 4] = -1.0, -1.5
    assert sample(logits, sequence([3], repetition_penalty=2.0)) == [4]


def test_a_drawn_token_depends_on_its_own_row_only() -> None:
    logits = random_logits(8)
    alone = [sample(logits[i : i + 1], sequence(seed=i, temperature=1.5))[0] for i in range(8)]
    together = sample(logits, *[sequence(seed=i, temperature=1.5) for i in range(8)])
    backwards = sample(
        logits.flip(0), *[sequence(seed=i, temperature=1.5) for i in reversed(range(8))]
    )
    among_greedy = sample(
        logits.repeat_interleave(2, 0),
        *[sequence(seed=i, temperature=t) for i in range(8) for t in (1.5, 0.0)],
    )
    assert together == alone
    assert backwards == alone[::-1]
    assert among_greedy[::2] == alone
    assert among_greedy[1::2] == logits.argmax(-1).tolist()


def test_other_seeds_draw_other_tokens() -> None:
    flat = torch.zeros(40, VOCABULARY)
    tokens = sample(flat, *[sequence(seed=seed, temperature=1.0) for seed in range(40)])
    assert len(set(tokens)) > 10


def test_other_positions_draw_other_tokens() -> None:
    flat = torch.zeros(40, VOCABULARY)
    tokens = sample(flat, *[sequence(output=n, seed=1, temperature=1.0) for n in range(40)])
    assert len(set(tokens)) > 10


@pytest.mark.parametrize("seed", [-(2**63), -1, 0, 2**63 - 1])
def test_every_64_bit_seed_draws(seed: int) -> None:
    assert sample(random_logits(), sequence(seed=seed, temperature=1.0))[0] in range(VOCABULARY)


@pytest.mark.parametrize(
    "vary",
    [
        pytest.param(lambda n: {"seed": n}, id="over seeds"),
        pytest.param(lambda n: {"seed": 3, "output": n}, id="over positions of one seed"),
    ],
)
def test_tokens_come_as_often_as_they_are_likely(vary: Any) -> None:
    draws = 4000
    row = torch.tensor([[0.0, 1.0, -1.0, 0.5, -0.5]])
    sequences = [sequence(temperature=0.8, **vary(n)) for n in range(draws)]
    tokens = Sampler(()).sample(row.repeat(draws, 1), sequences)
    expected = (row[0].double() / 0.8).softmax(-1) * draws
    seen = torch.bincount(torch.tensor(tokens), minlength=5).double()
    chi_square = ((seen - expected) ** 2 / expected).sum()
    assert chi_square < 18.5  # 4 degrees of freedom: above it once in a thousand


@pytest.mark.parametrize(
    "params",
    [
        pytest.param({"temperature": 1.5, "top_k": 1}, id="the single likeliest"),
        pytest.param({"temperature": 1.5, "top_p": 1e-9}, id="hardly any probability"),
        pytest.param({"temperature": 1e-3}, id="nearly no temperature"),
        pytest.param({"temperature": 1e-308}, id="a temperature that makes logits infinite"),
        pytest.param({"temperature": 5e-324}, id="the smallest temperature there is"),
        pytest.param({"temperature": 1e-308, "top_k": 5}, id="that and the five likeliest"),
    ],
)
def test_a_narrow_choice_is_greedy(params: dict[str, Any]) -> None:
    logits = random_logits(10)
    tokens = sample(logits, *[sequence(seed=n, **params) for n in range(10)])
    assert tokens == logits.argmax(-1).tolist()


def test_more_than_the_vocabulary_is_the_whole_vocabulary() -> None:
    logits = random_logits(10)
    everything = [sequence(seed=n, temperature=1.0) for n in range(10)]
    more = [sequence(seed=n, temperature=1.0, top_k=1000) for n in range(10)]
    assert sample(logits, *more) == sample(logits, *everything)


@pytest.mark.parametrize("number", [0.0, 1 - 2**-53])
def test_an_impossible_token_is_never_drawn(number: float, monkeypatch: Any) -> None:
    monkeypatch.setattr("blip2_serve.engine.sampler.uniform", lambda *_: number)
    logits = torch.full((1, VOCABULARY), -torch.inf)
    logits[0, 4], logits[0, 9] = 0.1, 0.7
    assert sample(logits, sequence(temperature=1.0)) == [4 if number == 0 else 9]
