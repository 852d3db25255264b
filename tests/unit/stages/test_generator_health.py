"""A generator that gets stuck, or computes no numbers, fails its health check."""

from __future__ import annotations

import asyncio
import threading
from typing import Any

import numpy as np
import pytest

from blip2_serve.config import AppConfig
from blip2_serve.errors import Blip2ServeError, TimedOut
from blip2_serve.stages.generator import Generator
from blip2_serve.types import Call, ImageFeatures, SamplingParams, TokenEvent
from support.replicas import replica

QUERIES, HIDDEN = 8, 128  # of the shipped checkpoint


def features(value: float = 0.0) -> ImageFeatures:
    data = np.full((QUERIES, HIDDEN), value, np.float32).tobytes()
    return ImageFeatures(f"{value}", data, (QUERIES, HIDDEN), "float32")


async def started() -> Any:
    made, loaded = replica(Generator, AppConfig(dtype="float32"), "cpu")
    await loaded
    return made


async def test_three_requests_in_a_row_without_numbers_are_unhealthy() -> None:
    generator = await started()
    for bad in (1, 2, None, 1, 2, 3):
        if bad is None:
            answer = await generator.generate(features(), "", SamplingParams(max_tokens=2))
            assert answer.completion_tokens
            continue
        with pytest.raises(Blip2ServeError, match="no finite numbers") as caught:
            await generator.generate(features(np.nan), "", SamplingParams(max_tokens=2))
        assert caught.value.status == 500
        if bad < 3:
            generator.check_health()
    with pytest.raises(RuntimeError, match="3 requests in a row"):
        generator.check_health()


async def test_a_step_that_does_not_end_is_unhealthy() -> None:
    generator = await started()
    await generator.generate(features(), "", SamplingParams(max_tokens=2))
    runner, gate = generator._loop._engine._runner, threading.Event()
    compute = runner.run

    def blocked(chunks: Any) -> Any:
        gate.wait()
        return compute(chunks)

    runner.run = blocked
    task = asyncio.create_task(generator.generate(features(), "", SamplingParams(max_tokens=2)))
    async with asyncio.timeout(20):
        while not generator._loop.stalled_s:
            await asyncio.sleep(0.001)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("blip2_serve.stages.generator.is_stalled", lambda since, _: since > 0)
        with pytest.raises(RuntimeError, match="no progress"):
            generator.check_health()
    gate.set()
    assert (await task).completion_tokens == 2


async def test_a_call_whose_time_is_over_is_not_computed() -> None:
    generator = await started()
    for seconds_left in (0.0, -1.0):
        with pytest.raises(TimedOut):
            await generator.generate(
                features(), "", SamplingParams(max_tokens=2), call=Call("a", seconds_left)
            )
    assert generator._loop.stats().steps == 0
    for call in (None, Call("a", None), Call("a", 3600.0)):
        await generator.generate(features(), "", SamplingParams(max_tokens=2), call=call)


async def test_a_stream_goes_on_after_what_was_sent() -> None:
    generator = await started()
    params = SamplingParams(max_tokens=8, n=2, temperature=1.0, seed=3, ignore_eos=True)

    async def read(sent: Any = ()) -> list[TokenEvent]:
        return [event async for event in generator.stream(features(), "a", params, sent)]

    whole = joined(await read())
    first, second = whole
    sent = (tuple(whole[0].token_ids[:5]), None)
    (rest,) = [event for event in joined(await read(sent)) if event]
    assert rest.token_ids == first.token_ids[5:]
    assert first.text.endswith(rest.text)
    assert (rest.finish_reason, rest.last) == ("length", True)
    assert rest.prompt_tokens == first.prompt_tokens
    assert len(second.token_ids) == 8


def joined(events: list[TokenEvent]) -> list[Any]:
    answers: list[Any] = [None, None]
    for event in events:
        before = answers[event.index]
        answers[event.index] = event if before is None else before + event
    return answers
