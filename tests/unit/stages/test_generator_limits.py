"""What the generator does with parameters that only it can check against the model."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from blip2_serve.config import AppConfig
from blip2_serve.errors import ContextLengthExceeded, InvalidRequest
from blip2_serve.stages.generator import Generator
from blip2_serve.types import Completion, ImageFeatures, SamplingParams
from support.replicas import replica

POSITIONS, VOCABULARY, QUERIES, HIDDEN = 512, 416, 8, 128  # of the shipped checkpoint
LONG = "red " * 480


async def started(**generator: Any) -> Any:
    config = AppConfig.model_validate({"dtype": "float32", "generator": generator})
    made, loaded = replica(Generator, config, "cpu")
    await loaded
    return made


async def generate(generator: Any, prompt: str = "", **params: Any) -> Completion:
    data = np.zeros((QUERIES, HIDDEN), np.float32).tobytes()
    features = ImageFeatures("black", data, (QUERIES, HIDDEN), "float32")
    made: Completion = await generator.generate(features, prompt, SamplingParams(**params))
    return made


async def test_max_tokens_is_cut_to_the_positions_that_the_prompt_leaves() -> None:
    generator = await started()
    for wanted in (POSITIONS, 2048, 10**12):
        answer = await generate(generator, LONG, max_tokens=wanted, ignore_eos=True)
        assert answer.prompt_tokens + answer.completion_tokens == POSITIONS
        assert answer.choices[0].finish_reason == "length"
    left = answer.completion_tokens
    exact = await generate(generator, LONG, max_tokens=left - 1, ignore_eos=True)
    assert exact.completion_tokens == left - 1
    again = await generate(generator, LONG, max_tokens=2048, min_tokens=left, ignore_eos=True)
    assert again.completion_tokens == left
    with pytest.raises(InvalidRequest) as caught:
        await generate(generator, LONG, max_tokens=2048, min_tokens=left + 1)
    assert caught.value.param == "min_tokens"


async def test_a_prompt_that_leaves_no_room_is_refused() -> None:
    generator = await started()
    for prompt in ("red " * 600, "red " * 100_000):
        with pytest.raises(ContextLengthExceeded, match=f"{POSITIONS} positions") as caught:
            await generate(generator, prompt, max_tokens=1)
        assert caught.value.param == "prompt"


async def test_max_tokens_is_cut_to_what_the_kv_cache_can_hold() -> None:
    generator = await started(kv_slots=60)
    for n, temperature in ((1, 0.0), (3, 1.0)):
        params = {"n": n, "temperature": temperature, "ignore_eos": True}
        answer = await generate(generator, max_tokens=2048, **params)
        each = 1 + (60 - answer.prompt_tokens) // n
        assert [len(choice.token_ids) for choice in answer.choices] == [each] * n
    with pytest.raises(ContextLengthExceeded, match="60") as caught:
        await generate(generator, LONG)
    assert caught.value.param == "prompt"


async def test_biases_must_be_of_tokens_of_the_vocabulary() -> None:
    generator = await started()
    last = ((VOCABULARY - 1, 100.0),)
    answer = await generate(generator, max_tokens=4, logit_bias=last, ignore_eos=True)
    assert answer.choices[0].token_ids == (VOCABULARY - 1,) * 4
    for token in (VOCABULARY, 10**30):
        with pytest.raises(InvalidRequest, match=f"below {VOCABULARY}") as caught:
            await generate(generator, logit_bias=((0, 1.0), (token, 1.0)))
        assert caught.value.param == "logit_bias"
