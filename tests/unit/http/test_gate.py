"""The gate: refusals before the body, slow bodies, and what a refused client sees."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator

import httpx
import pytest
from fastapi import FastAPI
from starlette.types import Message, Receive, Scope, Send

from blip2_serve.config import AppConfig
from blip2_serve.http import gate
from blip2_serve.http.access import Access
from blip2_serve.http.admission import Admission
from blip2_serve.http.refusals import Capacity
from blip2_serve.ingress_config import AccessConfig, AdmissionConfig
from support.fake_backend import ROUTES, FakeBackend, body_for, client_of, error_of, post
from support.recorder import FakeRecorder


def config_of(**admission: float) -> AppConfig:
    return AppConfig.model_validate({"ingress": {"admission": admission}})


async def until_encoding(backend: FakeBackend) -> None:
    async with asyncio.timeout(10):
        while not backend.encoded:
            await asyncio.sleep(0)


@pytest.mark.parametrize("route", [*ROUTES, "/v1/responses"])
async def test_a_busy_server_answers_429_with_the_time_to_come_back(route: str) -> None:
    backend, recorder = FakeBackend(can_do=Capacity(1e9, 0.1)), FakeRecorder()
    backend.held[b"picture"] = asyncio.Event()
    body = body_for(route)
    if route == "/v1/responses":
        content = [{"type": "input_image", "image_url": body["image"]}]
        body = {"input": [{"role": "user", "content": content}]}
    async with client_of(backend, config_of(min_requests=1), recorder) as client:
        first = asyncio.create_task(post(client, route, body))
        await until_encoding(backend)
        refused = await post(client, route, body)
        backend.held[b"picture"].set()

    assert (await first).status_code == 200
    assert refused.status_code == 429
    assert error_of(refused)["code"] == "overloaded"
    assert 1 <= int(refused.headers["retry-after"]) <= 60
    assert len(backend.encoded) == 1
    assert backend.refusals == 1
    assert recorder.total("blip2_shed_total", "wait") == 1
    assert recorder.total("blip2_admitted_total") == 1


async def test_probes_and_lists_are_answered_however_busy_the_server_is() -> None:
    backend = FakeBackend(can_do=Capacity(1e-9, 1e-9))
    backend.held[b"picture"] = asyncio.Event()
    async with client_of(backend, config_of(min_requests=1)) as client:
        first = asyncio.create_task(post(client, "/v1/caption", body_for("/v1/caption")))
        await until_encoding(backend)
        for path in ("/health", "/ready", "/v1/models"):
            assert (await client.get(path)).status_code == 200
        backend.held[b"picture"].set()
        await first


async def test_the_body_of_a_refused_request_is_read_to_its_end() -> None:
    backend = FakeBackend(can_do=Capacity(1e-9, 1e-9))
    backend.held[b"picture"] = asyncio.Event()
    sent = 0

    async def body() -> AsyncIterator[bytes]:
        nonlocal sent
        for _ in range(64):
            sent += 1
            yield bytes(65_536)

    async with client_of(backend, config_of(min_requests=1)) as client:
        first = asyncio.create_task(post(client, "/v1/caption", body_for("/v1/caption")))
        await until_encoding(backend)
        refused = await client.post("/v1/caption", content=body())
        backend.held[b"picture"].set()
        await first

    assert refused.status_code == 429
    assert sent == 64


async def test_a_body_that_does_not_arrive_in_time_is_a_408() -> None:
    async def body() -> AsyncIterator[bytes]:
        yield b"{"
        await asyncio.Event().wait()

    async with client_of(FakeBackend(), config_of(body_timeout_s=0.05)) as client:
        response = await client.post("/v1/caption", content=body())

    assert response.status_code == 408
    assert error_of(response)["code"] == "timeout"


async def test_slow_bodies_keep_nobody_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gate, "SLOW_AFTER_S", 0.01)
    backend = FakeBackend(can_do=Capacity(1.0, 1.0))  # of which ten would be too much
    body = json.dumps(body_for("/v1/caption")).encode()
    rest = asyncio.Event()

    async def dripping() -> AsyncIterator[bytes]:
        yield body[:10]
        await rest.wait()
        yield body[10:]

    async with client_of(backend, config_of(min_requests=100)) as client:
        app: FastAPI = client._transport.app  # type: ignore[attr-defined]
        slow = [
            asyncio.create_task(client.post("/v1/caption", content=dripping())) for _ in range(10)
        ]
        while app.state.admission.stats()["slow_bodies"] < len(slow):
            await asyncio.sleep(0.001)
        assert app.state.admission.wait_s() == pytest.approx(0)
        rest.set()
        assert [(await answer).status_code for answer in slow] == [200] * len(slow)
        assert not any(map(round, app.state.admission.stats().values()))


async def test_a_body_without_a_length_that_is_too_much_is_a_429_and_read_to_its_end() -> None:
    sent, held = 0, asyncio.Event()

    async def holding() -> AsyncIterator[bytes]:
        yield bytes(1000)
        held.set()
        await asyncio.Event().wait()

    async def chunks() -> AsyncIterator[bytes]:
        nonlocal sent
        for _ in range(64):
            sent += 1
            yield bytes(100)

    async with client_of(FakeBackend(), config_of(max_held_bytes=2000)) as client:
        first = asyncio.create_task(client.post("/v1/caption", content=holding()))
        await held.wait()
        refused = await client.post("/v1/caption", content=chunks())
        first.cancel()

    assert refused.status_code == 429
    assert refused.headers["retry-after"]
    assert sent == 64


async def test_one_slow_body_too_many_is_a_429(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gate, "SLOW_AFTER_S", 0.01)

    async def body() -> AsyncIterator[bytes]:
        yield b"{"
        await asyncio.Event().wait()

    async with client_of(FakeBackend(), config_of(max_slow_bodies=0)) as client:
        response = await client.post("/v1/caption", content=body())

    assert response.status_code == 429
    assert error_of(response)["code"] == "overloaded"


async def test_a_request_leaves_nothing_behind_however_it_ends() -> None:
    backend = FakeBackend(can_do=Capacity(1e-9, 1e-9))
    async with client_of(backend, config_of(min_requests=1)) as client:
        for _ in range(3):
            assert (await post(client, "/v1/caption", b"not JSON")).status_code == 400
            answer: httpx.Response = await post(client, "/v1/caption", body_for("/v1/caption"))
            assert answer.status_code == 200


@pytest.mark.parametrize(
    ("fields", "status"),
    [
        pytest.param({"n": 8, "temperature": 1, "max_tokens": 100}, 200, id="at the limit"),
        pytest.param({"n": 8, "temperature": 1, "max_tokens": 101}, 400, id="many long answers"),
        pytest.param({"num_beams": 8, "max_tokens": 101}, 400, id="long beams"),
        pytest.param({"max_tokens": 2000}, 200, id="one answer, which the model's length cuts"),
    ],
)
async def test_a_request_cannot_ask_for_more_tokens_than_the_limit(
    fields: dict[str, float], status: int
) -> None:
    async with client_of(FakeBackend(), config_of(max_total_tokens=800)) as client:
        response = await post(client, "/v1/generate", body_for("/v1/generate", **fields))

    assert response.status_code == status
    if status == 400:
        assert error_of(response)["param"] == "max_tokens"


async def test_a_crowd_that_comes_at_once_does_not_hold_up_others() -> None:
    """Bodies that are there go in one by one; what takes no time comes in between."""
    inside: list[str] = []

    async def app(scope: Scope, receive: Receive, _: Send) -> None:
        if scope["method"] == "POST":
            await receive()
        inside.append(scope["method"])

    async def receive() -> Message:
        return {"type": "http.request", "body": b"{}", "more_body": False}

    async def send(_: Message) -> None:
        raise AssertionError("nobody is refused")

    def scope(method: str) -> Scope:
        return {"type": "http", "method": method, "headers": []}

    admission = Admission(AdmissionConfig(), lambda: Capacity(1e9, 1e9), FakeRecorder())
    gate_of_app = gate.Gate(
        app, gate.Door(Access(AccessConfig()), admission, FakeRecorder(), 1000, 30.0)
    )
    async with asyncio.TaskGroup() as group:
        for method in ["POST"] * 50 + ["GET"]:
            group.create_task(gate_of_app(scope(method), receive, send))

    assert inside.index("GET") < 5
    assert inside.count("POST") == 50
