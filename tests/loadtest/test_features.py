"""The two sides of a comparison differ only in what is compared."""

from __future__ import annotations

from itertools import islice
from typing import Any

import pytest
from aiohttp import web

from loadtest.bench.features import BEAMS, TOKENS, alike, third_turns
from loadtest.bench.workload import Workload
from loadtest.stats import median_ratio, medians
from support.fake_server import Handler, chunk, serving, streaming, usage, whole


def test_greedy_and_beams_get_the_same_questions_and_lengths() -> None:
    greedy, beams = (list(islice(alike(Workload(1).requests(1), more), 5)) for more in ({}, BEAMS))

    assert [r.question for r in greedy] == [r.question for r in beams]
    assert {r.max_tokens for r in [*greedy, *beams]} == {TOKENS}
    assert [r.body("m", stream=False).get("num_beams") for r in [greedy[0], beams[0]]] == [None, 5]


async def test_the_same_third_turn_is_asked_about_a_known_and_a_new_picture() -> None:
    bodies: list[dict[str, Any]] = []

    async def handler(request: web.Request) -> web.StreamResponse:
        body = await request.json()
        bodies.append(body)
        tokens = body["max_tokens"]
        if not body.get("stream"):
            return web.json_response(whole(tokens, text=f"answer {len(bodies)}"))
        stream: Handler = streaming(chunk("a"), usage(tokens), b"data: [DONE]\n\n")
        return await stream(request)

    async with serving(handler) as endpoint:
        times = await third_turns(endpoint, Workload(1), pairs=2)

    assert len(times) == 2
    assert all(seconds > 0 for pair in times for seconds in pair)
    first, second, known, new = (body["messages"] for body in bodies[:4])
    assert first == second[:1]
    assert second == known[:3]
    assert (known[1]["content"], known[3]["content"]) == ("answer 1", "answer 2")
    assert new[1:] == known[1:]
    pictures = [m[0]["content"][0]["image_url"]["url"] for m in (first, second, known, new)]
    assert pictures[0] == pictures[1] == pictures[2] != pictures[3]
    # In the second pair the new picture comes first.
    assert bodies[7]["messages"][:3] == bodies[5]["messages"]
    assert len({str(body["messages"]) for body in bodies}) == 8


def test_ratios_are_taken_within_pairs() -> None:
    pairs = [(1.0, 2.0), (9.0, 3.0), (4.0, 4.0)]

    assert medians(pairs) == (4.0, 3.0)
    assert median_ratio(pairs) == pytest.approx(1.0)
