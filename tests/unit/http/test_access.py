"""With keys, every route asks for one, before it looks at anything else of a request."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any
from unittest import mock
from urllib.parse import urlsplit

import httpx
import pytest
from fastapi import FastAPI
from starlette.types import Message

from blip2_serve.config import AppConfig
from blip2_serve.errors import Overloaded, RateLimited
from blip2_serve.http import access
from blip2_serve.http.access import Access, Caller
from blip2_serve.http.admission import Ticket
from blip2_serve.http.api import create_app
from blip2_serve.http.keys import Key, hash_of
from blip2_serve.http.refusals import Capacity
from blip2_serve.ingress_config import AccessConfig
from support.fake_backend import ROUTES, TOKEN_IDS, FakeBackend, body_for, error_of, post
from support.recorder import FakeRecorder

SECRET = "blip2-secret"
HEADERS = {"authorization": f"Bearer {SECRET}"}
PROMPT_TOKENS = 40


@pytest.fixture
def file(tmp_path: Path) -> Path:
    file = tmp_path / "keys.yaml"
    write(file)
    return file


def write(file: Path, **limits: float) -> None:
    lines = [f"  {name}: {value}\n" for name, value in limits.items()]
    file.write_text(f"- name: alice\n  sha256: {hash_of(SECRET)}\n{''.join(lines)}")


def app_of(file: Path, **more: Any) -> FastAPI:
    config = {"ingress": {"access": {"keys_file": str(file), **more}}}
    return create_app(FakeBackend(), AppConfig.model_validate(config), FakeRecorder())


@asynccontextmanager
async def client_of(app: FastAPI) -> AsyncIterator[httpx.AsyncClient]:
    transport = httpx.ASGITransport(app, raise_app_exceptions=False)
    async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
        yield client


# -- who -------------------------------------------------------------------------------------------


def paths(app: FastAPI) -> Iterator[tuple[str, str]]:
    """Methods and paths of all routes that the application has."""
    for path, methods in app.openapi()["paths"].items():
        for method in methods:
            yield method.upper(), path.replace("{name}", "demo")
    for route in app.routes:
        yield "GET", str(getattr(route, "path", "/"))


async def test_every_route_but_the_probes_and_the_page_asks_for_a_key(file: Path) -> None:
    app = app_of(file)
    asked = [*paths(app), ("GET", "/nowhere"), ("POST", "/health/"), ("OPTIONS", "/v1/models")]
    assert len(asked) > 15
    async with client_of(app) as client:
        for method, path in asked:
            response = await client.request(method, path)
            if path in ("/health", "/ready", "/"):
                assert response.is_success
            else:
                assert response.status_code == 401, path
                assert response.headers["www-authenticate"] == "Bearer"
                if method != "HEAD":
                    assert error_of(response)["code"] == "invalid_api_key"


async def test_the_files_of_the_page_are_open_and_lead_nowhere_else(file: Path) -> None:
    async with client_of(app_of(file)) as client:
        assert (await client.get("/page/main.js")).status_code == 200
        for path in ("/page/../v1/models", "/page/%2e%2e/v1/models", "/page/..%2f..%2fconfig.py"):
            answer = await client.get(httpx.URL("http://test").copy_with(raw_path=path.encode()))
            assert answer.status_code in (401, 404), path
        assert (await client.get("/pages")).status_code == 401


@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize("scheme", ["Bearer", "bearer", "BEARER "])
async def test_with_the_key_a_request_is_answered(file: Path, route: str, scheme: str) -> None:
    async with client_of(app_of(file)) as client:
        client.headers["authorization"] = f"{scheme} {SECRET}"

        assert (await post(client, route, body_for(route))).status_code == 200


@pytest.mark.parametrize(
    "sent",
    [
        pytest.param(["Bearer blip2-secre"], id="the beginning of a key"),
        pytest.param([f"Bearer {SECRET}x"], id="a longer key"),
        pytest.param([f"Bearer {hash_of(SECRET)}"], id="its hash"),
        pytest.param([f"Basic {SECRET}"], id="another scheme"),
        pytest.param([SECRET], id="no scheme"),
        pytest.param(["Bearer"], id="no key"),
        pytest.param(["Bearer \t"], id="a blank key"),
        pytest.param([""], id="nothing"),
        pytest.param(["Bearer x", f"Bearer {SECRET}"], id="two, the second one right"),
        pytest.param([f"Bearer {SECRET}", "Bearer x"], id="two, the first one right"),
        pytest.param([f"Bearer x, Bearer {SECRET}"], id="two in one"),
    ],
)
async def test_anything_but_the_key_is_a_401_that_reveals_nothing(
    file: Path, sent: list[str], caplog: pytest.LogCaptureFixture
) -> None:
    app = app_of(file)
    with caplog.at_level(logging.DEBUG):
        async with client_of(app) as client:
            headers = [("authorization", value) for value in sent]
            response = await client.post("/v1/generate", headers=headers, content=b"{}")

    assert response.status_code == 401
    told = response.text + str(response.headers) + caplog.text
    assert not any(part in told for part in (SECRET, "blip2-secre", hash_of(SECRET)))
    assert app.state.admission.stats()["requests"] == 0


def path_of_url(scope: Any) -> str:
    """Weak: takes the path from the URL, which is put together from the Host header."""
    (host,) = (value.decode() for name, value in scope["headers"] if name == b"host")
    return urlsplit(f"http://{host}{scope['path']}").path


@pytest.mark.parametrize(
    ("path", "host"),
    [
        pytest.param("/v1/models", "x/health?", id="vLLM CVE-2026-48746"),
        pytest.param("/v1/models", "x/health#", id="a fragment in Host"),
        pytest.param("/health/../v1/models", "x", id="dots"),
        pytest.param("//health", "x", id="two slashes"),
        pytest.param("/health/", "x", id="a slash behind"),
        pytest.param("/HEALTH", "x", id="capitals"),
        pytest.param("/v1/models;/health", "x", id="a parameter"),
        pytest.param("/health\0", "x", id="a zero"),
    ],
)
@pytest.mark.parametrize("guard", ["as it is", "weak"])
async def test_a_path_that_looks_like_a_probe_asks_for_a_key(
    file: Path, path: str, host: str, guard: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if guard == "weak":
        monkeypatch.setattr(access, "_path", path_of_url)
    answers: list[Message] = []

    async def receive() -> Message:
        return {"type": "http.request", "body": b""}

    async def send(message: Message) -> None:
        answers.append(message)

    scope = {
        "type": "http",
        "method": "GET",
        "path": path,
        "raw_path": path.encode(),
        "root_path": "",
        "query_string": b"/health",
        "scheme": "http",
        "server": ("x", 80),
        "headers": [(b"host", host.encode())],
        "http_version": "1.1",
    }
    await app_of(file)(scope, receive, send)

    is_through = guard == "weak" and "/health" in host
    assert (answers[0]["status"] != 401) is is_through


async def test_where_the_application_is_mounted_is_no_part_of_the_path(file: Path) -> None:
    own = Access(AccessConfig(keys_file=str(file)))
    scope = {"type": "http", "method": "GET", "headers": [], "root_path": "/blip2"}

    assert own.caller({**scope, "path": "/blip2/health"}) is None
    for path in ("/blip2/v1/models", "/blip2", "/blip2/blip2/health", "/blip2health"):
        with pytest.raises(access.Unauthorized):
            own.caller({**scope, "path": path})


async def test_metrics_can_be_open(file: Path) -> None:
    async with client_of(app_of(file, metrics_open=True)) as client:
        assert (await client.get("/metrics")).status_code == 200
        assert (await client.get("/v1/models")).status_code == 401
        assert (await client.get("/metrics/")).status_code == 401


async def test_browsers_may_ask_without_a_key_what_they_may_send(file: Path) -> None:
    config = {"access": {"keys_file": str(file)}, "cors_origins": ["https://a.example"]}
    app = create_app(FakeBackend(), AppConfig.model_validate({"ingress": config}), FakeRecorder())
    headers = {"origin": "https://a.example", "access-control-request-method": "POST"}
    async with client_of(app) as client:
        preflight = await client.options("/v1/generate", headers=headers)
        refused = await client.post("/v1/generate", headers=headers, content=b"{}")

    # Ray Serve's proxy asks before the application sees the request.
    scope = {"type": "http", "method": "OPTIONS", "path": "/v1/generate"}
    sent = [(name.encode(), value.encode()) for name, value in headers.items()]
    own = Access(AccessConfig(keys_file=str(file)))
    assert own.caller({**scope, "headers": sent}) is None

    assert preflight.status_code == 200
    assert refused.status_code == 401
    assert refused.headers["access-control-allow-origin"] == "https://a.example"


# -- how much --------------------------------------------------------------------------------------


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def caller(clock: Clock, replicas: int = 1, **limits: Any) -> Caller:
    found = Caller("alice", clock)
    found.obey(Key(name="alice", sha256=hash_of(SECRET), **limits), replicas)
    return found


def wait_of(found: Caller) -> float:
    """Seconds that a request has to wait, by what a refusal says; 0: it ran."""
    try:
        found.check()
    except RateLimited as error:
        return error.retry_after_s or 0.0
    with found.running():
        return 0.0


@pytest.mark.parametrize(("limit", "replicas"), [(6, 1), (18, 3)])
def test_requests_per_minute(limit: float, replicas: int) -> None:
    clock = Clock()
    alice = caller(clock, replicas, requests_per_minute=limit)
    assert [wait_of(alice) for _ in range(7)] == [0.0] * 6 + [pytest.approx(10.0)]

    clock.now += 10.0
    assert wait_of(alice) == 0.0
    assert wait_of(alice) > 0.0
    clock.now += 600.0
    assert [wait_of(alice) > 0 for _ in range(8)] == [False] * 6 + [True] * 2


def test_tokens_per_minute_are_charged_afterwards() -> None:
    clock = Clock()
    alice = caller(clock, tokens_per_minute=60.0)
    for _ in range(2):
        assert wait_of(alice) == 0.0
        alice.used(50)  # the second time, 40 more than there were

    assert wait_of(alice) == pytest.approx(41.0)
    clock.now += 41.0
    assert wait_of(alice) == 0.0


def test_requests_at_once() -> None:
    alice = caller(Clock(), max_concurrent=2)
    with alice.running(), alice.running():
        assert wait_of(alice) == 1.0
    assert wait_of(alice) == 0.0


def test_without_limits_there_are_none() -> None:
    alice = caller(Clock())
    for _ in range(1000):
        assert wait_of(alice) == 0.0
        alice.used(10**9)


def test_what_was_used_outlives_a_change_of_the_limits(file: Path) -> None:
    clock = Clock()
    write(file, requests_per_minute=2)
    own = Access(AccessConfig(keys_file=str(file)), clock=clock)
    scope = {"type": "http", "method": "POST", "path": "/v1/caption", "headers": [header()]}
    found = own.caller(scope)
    assert found
    assert [wait_of(found) > 0 for _ in range(3)] == [False, False, True]

    write(file, requests_per_minute=3)
    clock.now = 2.0
    found = own.caller(scope)
    assert found
    assert [wait_of(found) > 0 for _ in range(2)] == [False, True]


def header() -> tuple[bytes, bytes]:
    return b"authorization", HEADERS["authorization"].encode()


async def test_a_caller_above_its_limit_gets_a_429_that_says_when(file: Path) -> None:
    write(file, requests_per_minute=1)
    app = app_of(file)
    async with client_of(app) as client:
        client.headers.update(HEADERS)
        assert (await post(client, "/v1/generate", body_for("/v1/generate"))).status_code == 200
        refused = await post(client, "/v1/generate", body_for("/v1/generate"))
        listed = await client.get("/v1/models")

    assert refused.status_code == 429
    assert error_of(refused)["code"] == "rate_limit_exceeded"
    assert 59 <= int(refused.headers["retry-after"]) <= 60
    assert listed.status_code == 200  # what computes nothing costs nothing


async def test_a_busy_server_charges_nothing_for_its_refusals(file: Path) -> None:
    write(file, requests_per_minute=1)
    app = app_of(file)
    async with client_of(app) as client:
        client.headers.update(HEADERS)
        with mock.patch.object(app.state.admission, "enter", side_effect=Overloaded("busy")):
            refused = await post(client, "/v1/generate", body_for("/v1/generate"))
        answered = await post(client, "/v1/generate", body_for("/v1/generate"))

    assert error_of(refused)["code"] == "overloaded"
    assert answered.status_code == 200


@pytest.mark.parametrize("stream", [False, True])
async def test_prompts_and_answers_are_charged(
    file: Path, stream: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    charged: list[int] = []
    monkeypatch.setattr(Caller, "used", lambda _, tokens: charged.append(tokens))
    async with client_of(app_of(file)) as client:
        client.headers.update(HEADERS)
        body = body_for("/v1/generate", stream=stream)
        answer = await post(client, "/v1/generate", body)

    assert answer.status_code == 200
    assert len(charged) == 1
    assert charged[0] > len(TOKEN_IDS)


async def test_a_stream_that_its_client_leaves_is_charged(
    file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    charged: list[int] = []
    monkeypatch.setattr(Caller, "used", lambda _, tokens: charged.append(tokens))
    config = {"ingress": {"access": {"keys_file": str(file)}}}
    app = create_app(FakeBackend(endless=True), AppConfig.model_validate(config), FakeRecorder())
    body = httpx.Request("POST", "http://x", json=body_for("/v1/generate", stream=True)).content
    sent = asyncio.Event()
    bodies = [{"type": "http.request", "body": body}]

    async def receive() -> Message:
        if bodies:
            return bodies.pop()
        await sent.wait()
        return {"type": "http.disconnect"}

    async def send(message: Message) -> None:
        if message.get("body"):
            sent.set()

    scope = {
        "type": "http",
        "method": "POST",
        "path": "/v1/generate",
        "query_string": b"",
        "headers": [header()],
    }
    async with asyncio.timeout(10):
        await app(scope, receive, send)
    assert len(charged) == 1
    assert charged[0] > 0


async def test_images_are_encoded_for_the_owner_of_the_key(file: Path) -> None:
    """vLLM CVE-2025-46722 and others: a hit in a cache tells what somebody else has sent."""
    backend = FakeBackend()
    bob = f"- name: bob\n  sha256: {hash_of('other')}\n"
    file.write_text(file.read_text() + bob)
    config = {"ingress": {"access": {"keys_file": str(file)}}}
    async with client_of(
        create_app(backend, AppConfig.model_validate(config), FakeRecorder())
    ) as client:
        for secret in (SECRET, "other"):
            client.headers["authorization"] = f"Bearer {secret}"
            await post(client, "/v1/generate", body_for("/v1/generate"))

    assert backend.owners == ["alice", "bob"]


# -- shares ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize(
    ("allowed", "asked", "expected"),
    [
        (0, None, 0),
        (0, 7, 7),
        (0, -7, 0),
        (-5, -3, -3),
        (-5, -7, -5),
        (10, None, 10),
    ],
)
async def test_a_request_has_the_priority_it_asks_for_if_its_key_allows_it(
    file: Path, route: str, allowed: int, asked: int | None, expected: int
) -> None:
    write(file, priority=allowed)
    app = app_of(file)
    with mock.patch.object(Ticket, "plan", autospec=True, side_effect=Ticket.plan) as plan:
        async with client_of(app) as client:
            client.headers.update(HEADERS)
            answer = await post(client, route, body_for(route, priority=asked))
    assert answer.status_code == 200
    assert plan.call_args.args[-1] == expected


async def test_without_a_key_no_priority_is_above_the_usual_one() -> None:
    app = create_app(FakeBackend(), AppConfig(), FakeRecorder())
    with mock.patch.object(Ticket, "plan", autospec=True, side_effect=Ticket.plan) as plan:
        async with client_of(app) as client:
            for asked in (-7, 7):
                await post(client, ROUTES[1], body_for(ROUTES[1], priority=asked))
    assert [call.args[-1] for call in plan.call_args_list] == [0, 7]


@pytest.mark.parametrize("priority", [1.5, "high", 1 << 31])
async def test_a_priority_is_a_whole_number(priority: Any) -> None:
    app = create_app(FakeBackend(), AppConfig(), FakeRecorder())
    async with client_of(app) as client:
        answer = await post(client, ROUTES[1], body_for(ROUTES[1], priority=priority))
    assert answer.status_code == 400
    assert error_of(answer)["param"] == "priority"


@pytest.mark.parametrize("by_address", [True, False])
async def test_owners_of_keys_or_clients_of_different_addresses_have_shares(
    file: Path, by_address: bool
) -> None:
    """Half of the bytes that may be held is not enough for two requests at once."""
    body = body_for(ROUTES[1], prompt="x" * 30_000)
    config: dict[str, Any] = {"admission": {"max_held_bytes": 100_000}}
    if by_address:
        config["access"] = {"share_by_address": True}
    else:
        config["access"] = {"keys_file": str(file)}
        file.write_text(
            "".join(f"- {{name: {n}, sha256: {hash_of(n)}}}\n" for n in ("alice", "bob"))
        )
    backend = FakeBackend(held={b"picture": asyncio.Event()})
    app = create_app(backend, AppConfig.model_validate({"ingress": config}), FakeRecorder())

    async def ask(number: int, who: str) -> int:
        transport = httpx.ASGITransport(app, client=(f"192.0.2.{number}", 1))
        async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
            client.headers["authorization"] = f"Bearer {who}"
            return (await post(client, ROUTES[1], body)).status_code

    async with asyncio.TaskGroup() as group:
        first = group.create_task(ask(1, "alice"))
        while not backend.encoded:
            await asyncio.sleep(0)
        other = group.create_task(ask(2, "bob"))
        while len(backend.encoded) < 2:
            await asyncio.sleep(0)
        assert await ask(1, "alice") == 429
        backend.held[b"picture"].set()
    assert first.result() == other.result() == 200


async def test_what_the_stages_have_no_room_for_waits_for_its_turn(file: Path) -> None:
    file.write_text("".join(f"- {{name: {n}, sha256: {hash_of(n)}}}\n" for n in ("alice", "bob")))
    admission = {"min_requests": 1, "max_wait_s": 100.0}
    config = {"ingress": {"admission": admission, "access": {"keys_file": str(file)}}}
    backend = FakeBackend(held={b"picture": asyncio.Event()}, can_do=Capacity(0.05, 0.05))
    app = create_app(backend, AppConfig.model_validate(config), FakeRecorder())

    async def ask(who: str) -> int:
        async with client_of(app) as client:
            client.headers["authorization"] = f"Bearer {who}"
            return (await post(client, ROUTES[1], body_for(ROUTES[1]))).status_code

    async with asyncio.TaskGroup() as group:
        first = group.create_task(ask("alice"))
        while not backend.encoded:
            await asyncio.sleep(0)
        other = group.create_task(ask("bob"))
        while not app.state.admission.stats()["waiting"]:
            assert not other.done()
            assert len(backend.encoded) == 1
            await asyncio.sleep(0)
        backend.held[b"picture"].set()
    assert first.result() == other.result() == 200
    assert len(backend.encoded) == 2
