"""Errors of Ray Serve's own proxy, in OpenAI's shape."""

from __future__ import annotations

import asyncio
import contextlib
import json
from pathlib import Path

import httpx
import pytest
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, PlainTextResponse, Response, StreamingResponse
from starlette.routing import Route
from starlette.types import Message, Receive, Scope, Send

from blip2_serve.environment import CLOSED_FILE
from blip2_serve.http.proxy import OpenAIErrors, middlewares
from support.fake_backend import error_of

TEXT = "Request 7f timed out after 0.05s."


async def text(request: Request) -> Response:
    headers = {"retry-after": "3", "x-request-id": "7f"}
    return PlainTextResponse(TEXT, int(request.path_params["status"]), headers)


async def ours(_: Request) -> Response:
    return JSONResponse({"error": {"message": "overloaded"}}, 503)


async def pieces(_: Request) -> Response:
    async def some() -> object:
        for piece in (b"a", b"b"):
            yield piece

    return StreamingResponse(some(), media_type="text/plain")  # type: ignore[arg-type]


async def get(path: str) -> httpx.Response:
    routes = [
        Route("/-/healthz/{status}", text),
        Route("/text/{status}", text),
        Route("/ours", ours),
        Route("/pieces", pieces),
    ]
    app = Starlette(routes=routes, middleware=middlewares())
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://x") as client:
        return await client.get(path)


@pytest.mark.parametrize(
    ("status", "code"), [(408, "timeout"), (429, "overloaded"), (503, "unavailable")]
)
async def test_an_error_in_plain_text_gets_openais_shape(status: int, code: str) -> None:
    response = await get(f"/text/{status}")

    assert response.status_code == status
    assert response.headers["content-type"] == "application/json"
    assert (response.headers["retry-after"], response.headers["x-request-id"]) == ("3", "7f")
    assert response.headers.get("x-should-retry") == ("false" if status == 408 else None)
    assert error_of(response)["code"] == code
    assert TEXT not in response.text


@pytest.mark.parametrize("path", ["/text/200", "/text/404", "/-/healthz/503"])
async def test_other_texts_pass(path: str) -> None:
    response = await get(path)

    assert response.text == TEXT
    assert response.headers["content-type"].startswith("text/plain")


async def test_answers_of_the_application_pass() -> None:
    assert (await get("/ours")).json() == {"error": {"message": "overloaded"}}
    assert (await get("/pieces")).text == "ab"


@pytest.mark.parametrize("how", [None, asyncio.CancelledError], ids=["returns", "is cancelled"])
async def test_a_stream_that_is_cut_off_ends_with_an_error(how: type[BaseException] | None) -> None:
    sent: list[Message] = []

    async def cut(_: Scope, __: Receive, send: Send) -> None:
        headers = [(b"content-type", b"text/event-stream; charset=utf-8")]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        await send({"type": "http.response.body", "body": b"data: {}\n\n", "more_body": True})
        if how:
            raise how

    async def send(message: Message) -> None:
        sent.append(message)

    async def receive() -> Message:
        raise AssertionError("not called")

    with contextlib.suppress(asyncio.CancelledError):
        await OpenAIErrors(cut)({"type": "http", "path": "/v1/generate"}, receive, send)
    last = sent[-1]
    assert not last.get("more_body")
    error = json.loads(last["body"].removeprefix(b"data: "))["error"]
    assert error["code"] == "unavailable"
    assert last["body"].endswith(b"\n\n")


async def test_an_answer_that_never_comes_is_a_503() -> None:
    async def lost(*_: object) -> None:
        pass

    transport = httpx.ASGITransport(OpenAIErrors(lost))
    async with httpx.AsyncClient(transport=transport, base_url="http://x") as client:
        response = await client.get("/v1/models")

    assert response.status_code == 503
    assert error_of(response)["code"] == "unavailable"


@pytest.mark.parametrize(
    ("path", "status"),
    [
        ("/ready", 503),
        ("/v1/generate", 503),
        ("/health", 200),
        ("/metrics", 200),
        ("/-/healthz", 200),
    ],
)
async def test_a_server_that_stops_is_closed_to_new_requests(
    path: str, status: int, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    closed = tmp_path / "closed"
    monkeypatch.setenv(CLOSED_FILE, str(closed))
    app = OpenAIErrors(Starlette(routes=[Route(path, pieces)]))
    transport = httpx.ASGITransport(app)
    async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
        assert (await client.get(path)).status_code == 200
        closed.touch()
        answer = await client.get(path)
    assert answer.status_code == status
    if status == 503:
        assert error_of(answer)["code"] == "unavailable"
        assert answer.headers["retry-after"] == "1"
