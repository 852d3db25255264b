"""What streams of the running application tell besides the answer."""

from __future__ import annotations

import json
import time
from typing import Any

import pytest

from blip2_serve.demo import scenes
from support.images import data_url
from support.oracle import Oracle
from support.server import App

SEARCH = {"num_beams": 4, "max_tokens": 12, "prompt": "a"}


async def stream(app: App, scene: int, **fields: Any) -> list[Any]:
    """The chunks of a streamed generation about a scene."""
    body = {"image": data_url(scenes.sample(scene).image), "stream": True, **fields}
    async with app.client() as client, client.stream("POST", "/v1/generate", json=body) as sent:
        assert sent.status_code == 200
        lines = [line async for line in sent.aiter_lines() if line]
    assert lines.pop() == "data: [DONE]"
    return [json.loads(line.removeprefix("data: ")) for line in lines]


@pytest.mark.parametrize("n", [1, 2])
async def test_beams_that_are_shown_lead_to_the_answer(
    random_model: tuple[App, Oracle], n: int
) -> None:
    app, _ = random_model
    plain = await stream(app, 9_400, **SEARCH, n=n)
    chunks = await stream(app, 9_400, **SEARCH, n=n, stream_options={"include_beams": True})
    steps = [chunk["beams"] for chunk in chunks if "beams" in chunk]
    texts = [
        "".join(c["choices"][0]["text"] for c in some if c["choices"][0]["index"] == 0)
        for some in (plain, [chunk for chunk in chunks if chunk["choices"]])
    ]
    assert texts[0] == texts[1]
    assert steps[-1][0]["text"] == texts[0]
    assert len(steps) > 1
    for beams in steps:
        assert 1 <= len(beams) <= 2 * SEARCH["num_beams"]  # type: ignore[operator]
        scores = [beam["score"] for beam in beams]
        assert scores == sorted(scores, reverse=True)


async def test_where_the_time_went_adds_up(random_model: tuple[App, Oracle]) -> None:
    app, _ = random_model
    asked = {"prompt": "a", "max_tokens": 20, "ignore_eos": True}
    began = time.perf_counter()
    chunks = await stream(app, 9_401, **asked, stream_options={"include_timing": True})
    seconds = time.perf_counter() - began
    timing = chunks[-1]["timing"]
    assert all(value > 0 for value in timing.values()), timing
    assert sum(timing.values()) <= seconds
