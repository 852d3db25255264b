"""The clients' history says what a server sent."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any

import aiohttp
import pytest
from aiohttp import web

from support import fake_server
from support.fake_server import Handler
from tests.chaos import checker, history
from tests.chaos.history import Choice
from tests.chaos.load import CHAT, KINDS, Load, Template, templates, undisturbed

ANSWER = (Choice("a dog", (5, 6), "stop"),)
STREAM = Template("chat, stream", CHAT, {"stream": True}, b"picture")
WHOLE = Template("chat", CHAT, {}, b"picture")


def choice(text: str, *tokens: int, reason: str | None = None, part: str = "delta") -> Any:
    content = {part: {"content": text}, "token_ids": tokens, "finish_reason": reason}
    return {"choices": [{"index": 0, **content}]}


def event(data: Any) -> bytes:
    return b"data: " + json.dumps(data).encode() + b"\n\n"


FIRST, LAST, DONE = (
    event(choice("a", 5)),
    event(choice(" dog", 6, reason="stop")),
    b"data: [DONE]\n\n",
)


async def verdict(
    folder: Path, handler: Handler, template: Template = STREAM
) -> tuple[str, list[history.Record]]:
    """What the checker finds after one request, and the history."""
    file = folder / "history.jsonl"
    writer = history.Writer(file)
    enough = asyncio.Event()

    async def once(request: web.Request) -> web.StreamResponse:
        enough.set()
        response: web.StreamResponse = await handler(request)
        return response

    async with fake_server.serving(once) as endpoint, aiohttp.ClientSession() as session:
        url = endpoint.url.removesuffix("/v1")
        await Load(url, [(template, ANSWER)], writer, 2.0, 1).run(session, enough)
    writer.close()
    records = history.read(file)
    return checker.check(records).verdicts[0].fault, records


def streaming(*parts: bytes) -> Handler:
    async def handle(request: web.Request) -> web.StreamResponse:
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
        await response.prepare(request)
        for part in parts:
            await response.write(part)
        return response

    return handle


async def test_a_whole_stream_is_recorded_event_by_event(tmp_path: Path) -> None:
    fault, records = await verdict(tmp_path, streaming(FIRST, LAST, DONE))
    names = [type(record).__name__ for record in records if record.id.endswith("-0")]  # type: ignore[union-attr]
    assert names == ["Sent", "Headers", "Event", "Event", "Event", "Ended"]
    assert fault == checker.OK


@pytest.mark.parametrize(
    ("parts", "fault"),
    [
        ((FIRST, LAST), "wrong 200"),
        ((FIRST, FIRST, LAST, DONE), "doubled"),
        ((FIRST, DONE), "wrong 200"),
        ((FIRST, event({"error": {"code": "unavailable"}})), "lost"),
    ],
)
async def test_a_broken_stream_is_found(
    tmp_path: Path, parts: tuple[bytes, ...], fault: str
) -> None:
    assert (await verdict(tmp_path, streaming(*parts)))[0] == fault


async def test_a_lost_connection_is_found(tmp_path: Path) -> None:
    async def cut(request: web.Request) -> web.StreamResponse:
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
        await response.prepare(request)
        await response.write(FIRST)
        assert request.transport is not None
        request.transport.close()
        return response

    fault, records = await verdict(tmp_path, cut)
    assert fault == "lost"
    (ended, *_) = [record for record in records if isinstance(record, history.Ended)]
    assert ended.how == "cut"
    assert ended.detail


async def test_a_body_and_an_error_are_recorded(tmp_path: Path) -> None:
    async def handle(_: web.Request) -> web.StreamResponse:
        return web.json_response(choice("a dog", 5, 6, reason="stop", part="message"))

    async def fail(_: web.Request) -> web.StreamResponse:
        return web.Response(status=503, text="no JSON")

    assert (await verdict(tmp_path, handle, WHOLE))[0] == checker.OK
    assert (await verdict(tmp_path, fail, WHOLE))[0] == "lost"


class Discarding(history.Writer):
    def __init__(self) -> None:
        pass

    def add(self, record: history.Record) -> None:
        pass


async def test_each_request_has_another_picture_and_its_own_id() -> None:
    seen = []

    async def handle(request: web.Request) -> web.StreamResponse:
        body = await request.json()
        seen.append((request.headers.get("x-request-id"), json.dumps(body["messages"])))
        if len(seen) == 5:
            enough.set()
        return web.json_response(choice("a dog", 5, 6, reason="stop", part="message"))

    enough = asyncio.Event()
    async with fake_server.serving(handle) as endpoint, aiohttp.ClientSession() as session:
        url = endpoint.url.removesuffix("/v1")
        (answer,) = await undisturbed(session, url, [WHOLE])
        assert answer == ANSWER
        seen.clear()
        await Load(url, [(WHOLE, ANSWER)], Discarding(), 50, 1).run(session, enough)
    assert len({name for name, _ in seen}) == len({body for _, body in seen}) == len(seen) >= 5


def test_templates_cover_every_kind_with_pictures_of_their_own() -> None:
    some = templates(2, 1)
    assert [template.kind for template in some[::2]] == [kind for kind, _, _ in KINDS]
    assert len({template.picture for template in some}) == len(some)
    assert templates(2, 1) == some
