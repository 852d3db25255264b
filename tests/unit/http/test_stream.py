"""Streamed answers of the routes over a fake backend."""

from __future__ import annotations

import asyncio
import json
import time
from typing import Any

import httpx
import pytest
from starlette.types import Message, Scope

from blip2_serve.config import AppConfig
from blip2_serve.errors import (
    Blip2ServeError,
    ContextLengthExceeded,
    Overloaded,
)
from blip2_serve.http.api import create_app
from blip2_serve.observe import metrics
from support.fake_backend import (
    ROUTES,
    TEXT,
    TOKEN_IDS,
    FakeBackend,
    body_for,
    chat,
    client_of,
    data_url,
    error_of,
    events_of,
    post,
)
from support.recorder import FakeRecorder


async def test_a_streamed_chat_sends_the_role_then_text_then_the_finish_reason(
    client: httpx.AsyncClient,
) -> None:
    response = await post(client, "/v1/chat/completions", chat(stream=True))
    first, *middle, last, done = events_of(response)

    assert done == "[DONE]"
    assert first["choices"] == [
        {
            "index": 0,
            "delta": {"role": "assistant", "content": ""},
            "logprobs": None,
            "finish_reason": None,
        }
    ]
    for chunk in middle:
        assert chunk["choices"][0]["delta"].keys() == {"content"}
        assert chunk["choices"][0]["finish_reason"] is None
    assert last["choices"][0]["finish_reason"] == "stop"
    heads = [{k: chunk[k] for k in ("id", "created", "model")} for chunk in (first, *middle, last)]
    assert all(head == heads[0] for head in heads)
    for chunk in (first, *middle, last):
        assert chunk["object"] == "chat.completion.chunk"
        assert "usage" not in chunk


async def test_a_streamed_chat_adds_up_to_the_whole_answer(client: httpx.AsyncClient) -> None:
    whole = (await post(client, "/v1/chat/completions", chat())).json()
    events = events_of(await post(client, "/v1/chat/completions", chat(stream=True)))

    deltas = [event["choices"][0]["delta"].get("content", "") for event in events[:-1]]
    assert "".join(deltas) == whole["choices"][0]["message"]["content"]


async def test_a_streamed_generation_adds_up_to_the_generated_text(
    client: httpx.AsyncClient,
) -> None:
    body = {"image": data_url(b"picture"), "stream": True}
    *chunks, done = events_of(await post(client, "/v1/generate", body))

    assert done == "[DONE]"
    assert "".join(chunk["choices"][0]["text"] for chunk in chunks) == f" picture:{TEXT}"
    assert {chunk["object"] for chunk in chunks} == {"text_completion"}
    assert [c["choices"][0]["finish_reason"] for c in chunks][-1] == "stop"


@pytest.mark.parametrize("route", ROUTES[:2])
@pytest.mark.parametrize(
    "asked",
    [
        pytest.param({"n": 3, "temperature": 1}, id="samples"),
        pytest.param({"n": 2, "num_beams": 4}, id="best beams"),
        pytest.param({"num_beams": 4}, id="the best beam"),
    ],
)
async def test_streamed_choices_add_up_to_the_whole_ones(
    client: httpx.AsyncClient, route: str, asked: dict[str, Any]
) -> None:
    whole = (await post(client, route, body_for(route, **asked))).json()["choices"]
    events = events_of(await post(client, route, body_for(route, **asked, stream=True)))

    streamed = [""] * len(whole)
    for event in events[:-1]:
        (choice,) = event["choices"]
        text = choice["text"] if "text" in choice else choice["delta"].get("content", "")
        streamed[choice["index"]] += text
    assert streamed == [c["text"] if "text" in c else c["message"]["content"] for c in whole]


@pytest.mark.parametrize("route", ROUTES[:2])
async def test_streamed_log_probabilities_add_up_to_those_of_the_whole_answer(
    client: httpx.AsyncClient, route: str
) -> None:
    asked: dict[str, Any] = {"logprobs": 2}
    if "chat" in route:
        asked = {"logprobs": True, "top_logprobs": 2}
    whole = (await post(client, route, body_for(route, **asked))).json()["choices"][0]["logprobs"]
    events = events_of(await post(client, route, body_for(route, **asked, stream=True)))

    parts = [event["choices"][0]["logprobs"] or {} for event in events[:-1]]
    for name in whole.keys() - {"refusal"}:
        assert [entry for part in parts for entry in part.get(name, [])] == whole[name]


@pytest.mark.parametrize("route", ROUTES[:2])
async def test_every_token_id_is_sent_once(client: httpx.AsyncClient, route: str) -> None:
    body = body_for(route, stream=True, return_token_ids=True)
    events = events_of(await post(client, route, body))

    ids = [i for event in events[:-1] for i in event["choices"][0].get("token_ids", [])]
    assert ids == list(TOKEN_IDS)


@pytest.mark.parametrize("route", ROUTES[:2])
async def test_usage_is_the_last_chunk_on_request(client: httpx.AsyncClient, route: str) -> None:
    body = body_for(route, stream=True, stream_options={"include_usage": True})
    *chunks, usage, done = events_of(await post(client, route, body))

    assert done == "[DONE]"
    assert usage["choices"] == []
    assert usage["usage"] == (await post(client, route, body_for(route))).json()["usage"]
    assert all(chunk["usage"] is None for chunk in chunks)


def told(events: list[Any], name: str) -> list[Any]:
    """What chunks without choices tell under this name."""
    return [event[name] for event in events if not event["choices"] and name in event]


@pytest.mark.parametrize("route", ROUTES[:2])
async def test_a_stream_tells_of_nothing_but_its_answer_unless_asked(route: str) -> None:
    backend = FakeBackend(loses_replica_after=1)
    async with client_of(backend) as client:
        *chunks, _ = events_of(await post(client, route, body_for(route, stream=True, num_beams=2)))

    assert all(chunk["choices"] for chunk in chunks)
    assert not any(chunk.keys() & {"timing", "beams", "event"} for chunk in chunks)
    assert not backend.params[0].show_beams


@pytest.mark.parametrize("route", ROUTES[:2])
async def test_the_beams_of_a_search_are_told_on_request(
    client: httpx.AsyncClient, route: str
) -> None:
    body = body_for(route, stream=True, num_beams=2, stream_options={"include_beams": True})
    *chunks, _ = events_of(await post(client, route, body))

    beams = told(chunks, "beams")
    assert len(beams) == len(TOKEN_IDS)
    assert beams[0] == [
        {"text": "a cat", "score": -0.5, "ended": False},
        {"text": "a cow", "score": -0.75, "ended": True},
    ]


@pytest.mark.parametrize("route", ROUTES[:2])
async def test_a_lost_replica_is_told_where_another_goes_on(route: str) -> None:
    body = body_for(route, stream=True, stream_options={"include_events": True})
    async with client_of(FakeBackend(loses_replica_after=2)) as client:
        *chunks, _ = events_of(await post(client, route, body))

    assert told(chunks, "event") == [{"type": "replica_replaced"}]
    at = next(i for i, chunk in enumerate(chunks) if "event" in chunk)
    earlier = [c for c in chunks[:at] if c["choices"] and c["choices"][0].get("delta", {"": 1})]
    assert len(earlier) == 2 + ("chat" in route)  # a chat begins with a chunk for the role


@pytest.mark.parametrize("route", ROUTES[:2])
@pytest.mark.parametrize("usage", [False, True])
async def test_the_last_chunk_tells_where_the_time_went_on_request(
    client: httpx.AsyncClient, route: str, usage: bool
) -> None:
    options = {"include_timing": True, "include_usage": usage}
    began = time.perf_counter()
    body = body_for(route, stream=True, stream_options=options)
    *chunks, last, _ = events_of(await post(client, route, body))
    seconds = time.perf_counter() - began

    assert last["choices"] == []
    assert ("usage" in last) is usage
    assert [*last["timing"]] == [
        "admission_s",
        "image_decode_s",
        "image_encode_s",
        "queue_s",
        "first_token_s",
        "tokens_s",
    ]
    assert all(value >= 0 for value in last["timing"].values())
    assert 0 < sum(last["timing"].values()) <= seconds
    assert not any("timing" in chunk for chunk in chunks)


async def test_time_is_told_by_what_it_was_spent_on() -> None:
    body = chat(stream=True, stream_options={"include_timing": True})
    timings = []
    # What an earlier request paid for, or a stage claims beyond the time there was, is not charged.
    for encode_s, queue_s in ((0.0, 0.0), (60.0, 60.0)):
        async with client_of(FakeBackend(encode_s=encode_s, queue_s=queue_s)) as client:
            events = events_of(await post(client, ROUTES[0], body))
        timings += told(events[:-1], "timing")
    free, busy = timings
    assert free["image_encode_s"] == free["queue_s"] == 0
    assert free["image_decode_s"] > 0
    assert free["first_token_s"] > 0
    assert busy["image_decode_s"] == busy["first_token_s"] == 0
    assert 0 < busy["image_encode_s"] < 60
    assert 0 < busy["queue_s"] < 60


async def test_beams_are_no_tokens_to_the_metrics() -> None:
    recorder = FakeRecorder()
    body = chat(stream=True, num_beams=2, stream_options={"include_beams": True})
    async with client_of(FakeBackend(), recorder=recorder) as client:
        await post(client, ROUTES[0], body)

    latencies = recorder.observed[metrics.INTER_TOKEN_LATENCY.name, ROUTES[0]]
    assert len(latencies) == len(TOKEN_IDS) - 1


@pytest.mark.parametrize(
    ("failure", "status"),
    [
        pytest.param(Overloaded("try again later"), 429, id="queue full"),
        pytest.param(ContextLengthExceeded("too long"), 400, id="too long"),
    ],
)
async def test_an_error_before_the_first_token_sets_the_status_of_a_stream_too(
    client: httpx.AsyncClient, backend: FakeBackend, failure: Blip2ServeError, status: int
) -> None:
    backend.generation_failure = failure
    for stream in (False, True):
        response = await post(client, "/v1/chat/completions", chat(stream=stream))

        assert response.status_code == status
        assert error_of(response) == failure.body()["error"]


async def test_an_error_during_a_stream_is_its_last_event(
    client: httpx.AsyncClient, backend: FakeBackend
) -> None:
    backend.stream_fails_after = 3
    response = await post(client, "/v1/chat/completions", chat(stream=True))

    *_, text, error = events_of(response)
    assert response.status_code == 200
    assert "content" in text["choices"][0]["delta"]
    assert error == {
        "error": {
            "message": "a replica was lost",
            "type": "server_error",
            "param": None,
            "code": "unavailable",
        }
    }


def scope_of(route: str) -> Scope:
    return {
        "type": "http",
        "asgi": {"version": "3.0", "spec_version": "2.0"},
        "http_version": "1.1",
        "method": "POST",
        "path": route,
        "raw_path": route.encode(),
        "query_string": b"",
        "headers": [],
        "server": ("test", 80),
        "scheme": "http",
    }


@pytest.mark.parametrize("more", [{}, {"n": 2, "temperature": 0}], ids=["one", "two equal"])
@pytest.mark.parametrize("route", ROUTES[:2])
@pytest.mark.parametrize("told", ["by a message", "by an error"])
async def test_generation_stops_when_the_client_disconnects(
    told: str, route: str, more: dict[str, Any]
) -> None:
    backend = FakeBackend(endless=True)
    started = asyncio.Event()
    body = body_for(route, stream=True, **more)
    unread = [{"type": "http.request", "body": json.dumps(body).encode()}]

    async def receive() -> Message:
        if unread:
            return unread.pop()
        await started.wait()
        if told == "by an error":
            raise RuntimeError("the call for more messages was cancelled")
        return {"type": "http.disconnect"}

    async def send(message: Message) -> None:
        if message["type"] == "http.response.body":
            started.set()
        await asyncio.sleep(0)  # lets the disconnect be received, as a socket would

    async with asyncio.timeout(5):
        await create_app(backend, AppConfig(), FakeRecorder())(scope_of(route), receive, send)
        await backend.stream_closed.wait()


@pytest.mark.parametrize("more", [{}, {"n": 2, "temperature": 0}], ids=["one", "two equal"])
@pytest.mark.parametrize("route", ROUTES[:2])
@pytest.mark.parametrize(
    "sendable", [pytest.param(0, id="the headers"), pytest.param(3, id="a later chunk")]
)
async def test_generation_stops_when_sending_fails(
    route: str, sendable: int, more: dict[str, Any]
) -> None:
    backend = FakeBackend(endless=True)
    body = body_for(route, stream=True, **more)
    unread = [{"type": "http.request", "body": json.dumps(body).encode()}]
    sent: list[Message] = []

    async def receive() -> Message:
        if not unread:
            await asyncio.Event().wait()
        return unread.pop()

    async def send(message: Message) -> None:
        if len(sent) == sendable:
            raise ConnectionError("lost")
        sent.append(message)

    async with asyncio.timeout(5):
        with pytest.raises((ConnectionError, ExceptionGroup)):
            await create_app(backend, AppConfig(), FakeRecorder())(scope_of(route), receive, send)
        assert backend.stream_closed.is_set()


async def test_an_unexpected_error_during_a_stream_is_logged_but_not_revealed(
    client: httpx.AsyncClient, backend: FakeBackend, caplog: pytest.LogCaptureFixture
) -> None:
    backend.stream_fails_after, backend.stream_failure = 3, KeyError("secret")
    response = await post(client, "/v1/chat/completions", chat(stream=True))

    assert events_of(response)[-1]["error"]["type"] == "server_error"
    assert "secret" not in response.text
    assert "secret" in caplog.text
