"""The window's arithmetic, server-sent events, and wrong answers, which are never counted."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from dataclasses import replace
from itertools import repeat
from typing import Any

import pytest
from aiohttp import ClientSession, web

from loadtest.answers import WrongAnswer
from loadtest.bench.client import Answer, Window, ask, events, measure
from loadtest.bench.servers import Endpoint
from loadtest.bench.workload import Request
from support.fake_server import Handler, chunk, serving, streaming, usage, whole

REQUEST = Request("what is it?", "data:image/jpeg;base64,AAAA", max_tokens=3)


async def asked(handler: Handler, *, stream: bool = False) -> Answer:
    async with serving(handler) as endpoint, ClientSession() as session:
        return await ask(session, endpoint, REQUEST, stream=stream)


# -- the window ------------------------------------------------------------------------------------


def test_an_answer_counts_by_the_share_of_its_time_in_the_window() -> None:
    answers = [
        Answer(8, 12, tokens=40),  # half inside
        Answer(12, 16, tokens=20),  # inside
        Answer(16, 24, tokens=80),  # half inside
        Answer(0, 8, tokens=999),  # before
        Answer(20, 21, tokens=999),  # after
    ]

    requests, tokens = Window(10, 20, answers).per_second()

    assert requests == pytest.approx((0.5 + 1 + 0.5) / 10)
    assert tokens == pytest.approx((20 + 20 + 40) / 10)


@pytest.mark.parametrize("opened", [10.0, 11.0, 13.7])
def test_batches_give_their_true_rate_wherever_the_window_lies(opened: float) -> None:
    batches = [Answer(4 * i, 4 * (i + 1), tokens=5) for i in range(20) for _ in range(32)]

    requests, tokens = Window(opened, opened + 10, batches).per_second()

    assert requests == pytest.approx(8)
    assert tokens == pytest.approx(40)


def test_latencies_count_answers_that_ended_in_the_window() -> None:
    inside, after = Answer(8, 12, tokens=1), Answer(16, 24, tokens=1)

    assert Window(10, 20, [inside, after]).ended_inside() == [inside]


async def test_users_are_busy_before_throughout_and_after_the_window() -> None:
    busy: list[int] = []
    under_way = 0

    async def handler(_: web.Request) -> web.Response:
        nonlocal under_way
        under_way += 1
        busy.append(under_way)
        await asyncio.sleep(0.02)
        under_way -= 1
        return web.json_response(whole(3))

    async with serving(handler) as endpoint:
        window = await measure(endpoint, repeat(REQUEST), users=4, seconds=0.2, stream=False)

    assert max(busy) == 4
    assert window.closed - window.opened == pytest.approx(0.2)
    assert sum(a.ended <= window.opened for a in window.answers) >= 4
    assert max(a.ended for a in window.answers) >= window.closed
    requests, tokens = window.per_second()
    assert tokens == pytest.approx(3 * requests)


# -- answers ---------------------------------------------------------------------------------------


async def test_a_right_answer_is_timed() -> None:
    async def handler(_: web.Request) -> web.Response:
        return web.json_response(whole(3))

    answer = await asked(handler)

    assert answer.tokens == 3
    assert answer.started < answer.ended
    assert answer.texts == ()
    assert answer.text == "a dog"


async def test_a_silent_request_accepts_an_answer_without_text() -> None:
    async def handler(_: web.Request) -> web.Response:
        return web.json_response(whole(3, text=""))

    async with serving(handler) as endpoint, ClientSession() as session:
        answer = await ask(session, endpoint, REQUEST, stream=False, silent=True)

    assert answer.text == ""


async def test_tokens_of_several_choices_are_added_up() -> None:
    async def handler(_: web.Request) -> web.Response:
        return web.json_response(whole(6))

    async with serving(handler) as endpoint, ClientSession() as session:
        answer = await ask(session, endpoint, replace(REQUEST, more={"n": 2}), stream=False)

    assert answer.tokens == 6


@pytest.mark.parametrize(
    ("status", "body", "what"),
    [
        (200, whole(2), "2 tokens instead of 3"),
        (200, whole(3, text=""), "no text"),
        (200, {"choices": []}, "usage"),
        (503, {"error": {"message": "overloaded"}}, "status 503.*overloaded"),
    ],
)
async def test_a_wrong_answer_is_an_error(status: int, body: dict[str, Any], what: str) -> None:
    async def handler(_: web.Request) -> web.Response:
        return web.json_response(body, status=status)

    with pytest.raises(WrongAnswer, match=what):
        await asked(handler)


async def test_the_first_wrong_answer_ends_the_measurement() -> None:
    count = 0

    async def handler(_: web.Request) -> web.Response:
        nonlocal count
        count += 1
        return web.json_response(whole(3 if count < 6 else 4))

    async with serving(handler) as endpoint:
        with pytest.raises(WrongAnswer, match="4 tokens instead of 3"):
            await measure(endpoint, repeat(REQUEST), users=2, seconds=60, stream=False)


async def test_no_server_is_a_wrong_answer() -> None:
    with pytest.raises(WrongAnswer, match="Connect"):
        async with ClientSession() as session:
            await ask(session, Endpoint("http://127.0.0.1:9/v1", "m"), REQUEST, stream=False)


# -- streams ---------------------------------------------------------------------------------------


async def test_each_text_of_a_stream_is_timed() -> None:
    parts = [chunk(""), chunk("a"), chunk(None), chunk(" dog"), usage(3), b"data: [DONE]\n\n"]

    answer = await asked(streaming(*parts), stream=True)

    assert answer.tokens == 3
    assert len(answer.texts) == 2
    assert answer.text == "a dog"
    assert answer.started < answer.texts[0] <= answer.texts[1] <= answer.ended


@pytest.mark.parametrize(
    ("parts", "what"),
    [
        ([chunk("a"), usage(2), b"data: [DONE]\n\n"], "2 tokens instead of 3"),
        ([chunk("a"), usage(3)], "without"),
        ([chunk(""), usage(3), b"data: [DONE]\n\n"], "no text"),
        ([chunk("a"), b"data: [DONE]\n\n"], "NoneType"),
        ([b'data: {"error": {"message": "lost"}}\n\n', b"data: [DONE]\n\n"], "lost"),
    ],
)
async def test_a_wrong_stream_is_an_error(parts: list[bytes], what: str) -> None:
    with pytest.raises(WrongAnswer, match=what):
        await asked(streaming(*parts), stream=True)


async def test_comments_and_other_fields_of_event_streams_are_skipped() -> None:
    async def lines() -> AsyncIterator[bytes]:
        for line in [b": ping\n", b"\n", b'data: {"a": 1}\r\n', b"\r\n", b'data:{"b": "x:y"}\n']:
            yield line
        yield b"event: end\n"
        yield b"data: [DONE]\n"
        yield b"not read any more"

    assert [event async for event in events(lines())] == [{"a": 1}, {"b": "x:y"}]
