"""A server with a small KV cache answers many concurrent requests, one after the other."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Iterator
from typing import Any

import pytest
from ray import serve

from blip2_serve.demo import scenes
from support.images import data_url
from support.server import App, start_app

REQUESTS = 300
PROMPT_TOKENS, ANSWER_TOKENS = 20, 30  # per typical request
KV_SLOTS = 16 * (PROMPT_TOKENS + ANSWER_TOKENS)


@pytest.fixture(scope="module")
def small(base_url: str) -> Iterator[App]:
    app = start_app(base_url, "small", {"generator": {"kv_slots": KV_SLOTS}})
    yield app
    serve.delete(app.name)


def mixed_requests() -> list[dict[str, Any]]:
    rng = random.Random(0)
    images = [data_url(scenes.sample(seed).image) for seed in range(7_000, 7_020)]
    questions = [question for question, _ in scenes.sample(7_000).questions]
    return [
        {
            "image": rng.choice(images),
            "prompt": " ".join(rng.choices(questions, k=rng.randint(0, 4))),
            "max_tokens": rng.randint(1, 2 * ANSWER_TOKENS),
            "ignore_eos": True,
            **rng.choice([{}, {}, {}, {"n": 3, "temperature": 1}, {"num_beams": 4}]),
        }
        for _ in range(REQUESTS)
    ]


async def test_300_concurrent_requests_share_slots_for_sixteen(small: App) -> None:
    bodies = mixed_requests()
    async with small.client() as client:
        answers = await asyncio.gather(*(client.post("/v1/generate", json=b) for b in bodies))

    assert [answer.status_code for answer in answers] == [200] * REQUESTS
    tokens = [answer.json()["usage"]["completion_tokens"] for answer in answers]
    assert tokens == [body["max_tokens"] * body.get("n", 1) for body in bodies]
    after = await small.until_idle()
    assert after["kv_slots_total"] == KV_SLOTS
    assert after["kv_slots_used"] == after["kv_slots_cached"]


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "streamed"])
def test_a_minimum_that_can_never_fit_is_rejected(stream: bool, small: App) -> None:
    body = {"image": data_url(scenes.sample(7_000).image), "stream": stream}
    too_large = {"max_tokens": 500, "min_tokens": 1 + KV_SLOTS // 8, "num_beams": 8}

    answer = small.post("/v1/generate", json={**body, **too_large})

    assert answer.status_code == 400, answer.text
    error = answer.json()["error"]
    assert error["param"] == "min_tokens"
    assert f"{KV_SLOTS} KV slots" in error["message"]
    assert small.post("/v1/generate", json={**body, "max_tokens": 1}).status_code == 200


def test_an_answer_is_cut_to_what_the_slots_can_hold(small: App) -> None:
    image = data_url(scenes.sample(7_000).image)
    body = {"image": image, "max_tokens": 2048, "ignore_eos": True, "num_beams": 8}

    answer = small.post("/v1/generate", json=body).json()

    usage = answer["usage"]
    assert usage["completion_tokens"] == 1 + (KV_SLOTS - usage["prompt_tokens"]) // 8
    assert answer["choices"][0]["finish_reason"] == "length"
