"""The time limit that a client sets by a header."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncGenerator

import httpx
import pytest
from starlette.requests import Request

from blip2_serve.config import AppConfig
from blip2_serve.errors import TimedOut
from blip2_serve.http.deadline import HEADER, Alarm, limited
from blip2_serve.types import TokenEvent
from support.fake_backend import ROUTES, FakeBackend, body_for, client_of, error_of, events_of, post
from support.recorder import FakeRecorder


class Slow(FakeBackend):
    """Never answers; a stream stops after its first token."""

    async def generate(self, *_: object) -> None:  # type: ignore[override]
        await asyncio.Event().wait()

    async def stream(self, *_: object) -> AsyncGenerator[TokenEvent, None]:  # type: ignore[override]
        try:
            yield TokenEvent((7,), " a", None, 9)
            await asyncio.Event().wait()
        finally:
            self.stream_closed.set()


async def send(
    client: httpx.AsyncClient, route: str, limit: str | None, **more: object
) -> httpx.Response:
    headers = {"content-type": "application/json"} | ({HEADER: limit} if limit else {})
    async with asyncio.timeout(20):
        body = json.dumps(body_for(route, **more))
        return await client.post(route, content=body, headers=headers)


@pytest.mark.parametrize("route", ROUTES)
async def test_an_answer_that_takes_longer_is_a_408_in_openais_shape(route: str) -> None:
    recorder = FakeRecorder()
    async with client_of(Slow(), recorder=recorder) as client:
        response = await send(client, route, "0.05")

    assert response.status_code == 408
    assert error_of(response) == {
        "message": f"the answer took longer than the header {HEADER} allows",
        "type": "server_error",
        "param": None,
        "code": "timeout",
    }


@pytest.mark.parametrize("route", ROUTES[:2])
async def test_a_stream_that_takes_longer_says_so_and_stops_the_work(route: str) -> None:
    backend = Slow()
    async with client_of(backend) as client:
        response = await send(client, route, "0.05", stream=True)

    *_, error = events_of(response)
    assert response.status_code == 200
    assert error["error"]["code"] == "timeout"
    assert backend.stream_closed.is_set()


@pytest.mark.parametrize("limit", [None, "3600", "0", "soon"])
@pytest.mark.parametrize("stream", [False, True])
async def test_no_request_takes_longer_than_the_server_allows(
    limit: str | None, stream: bool
) -> None:
    backend = Slow()
    async with client_of(backend, AppConfig(request_timeout_s=0.1)) as client:
        response = await send(client, ROUTES[1], limit, stream=stream)

    error = events_of(response)[-1]["error"] if stream else error_of(response)
    assert response.status_code == (200 if stream else 408)
    assert error["code"] == "timeout"
    assert error["message"] == "the answer took longer than this server allows"
    assert "[DONE]" not in response.text
    assert backend.stream_closed.is_set() == stream


@pytest.mark.parametrize("ring_first", [False, True])
async def test_an_alarm_rings_for_what_is_awaited_then_and_later(ring_first: bool) -> None:
    request = Request({"type": "http", "headers": []})
    async with limited(request, 0.2):
        alarm = Alarm()
    if ring_first:
        await asyncio.sleep(0.2)
    with pytest.raises(TimedOut):
        await alarm.wait(asyncio.Event().wait())
    assert asyncio.current_task().cancelling() == 0  # type: ignore[union-attr]


async def test_a_cancellation_is_no_alarm() -> None:
    async with limited(Request({"type": "http", "headers": []}), 60):
        alarm = Alarm()
    task = asyncio.create_task(alarm.wait(asyncio.Event().wait()))
    await asyncio.sleep(0)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    alarm.stop()


@pytest.mark.parametrize("limit", ["30", "0", "-1", "nan", "inf", "soon", ""])
@pytest.mark.parametrize("stream", [False, True])
async def test_a_limit_that_is_none_or_is_kept_changes_nothing(limit: str, stream: bool) -> None:
    async with client_of(FakeBackend()) as client:
        limited = await send(client, ROUTES[1], limit, stream=stream)
        free = await post(client, ROUTES[1], body_for(ROUTES[1], stream=stream))

    assert limited.status_code == free.status_code == 200
    assert len(limited.text) == len(free.text)


async def test_a_limit_is_for_its_own_request_only() -> None:
    async with client_of(FakeBackend()) as client:
        await send(client, ROUTES[1], "0.01")
        await asyncio.sleep(0.02)
        response = await post(client, ROUTES[1], body_for(ROUTES[1], stream=True))

    assert events_of(response)[-1] == "[DONE]"
