"""Metrics of HTTP exchanges over a fake backend."""

from __future__ import annotations

import asyncio
import json
from contextlib import suppress
from typing import Any

import httpx
import pytest
from starlette.requests import Request

from blip2_serve.config import AppConfig
from blip2_serve.errors import (
    Blip2ServeError,
    ContextLengthExceeded,
    InvalidImage,
    Overloaded,
    Quarantined,
    TimedOut,
    Unavailable,
)
from blip2_serve.http.api import create_app, scrape_timeout_s
from blip2_serve.observe import metrics
from support.fake_backend import (
    ROUTES,
    TOKEN_IDS,
    FakeBackend,
    body_for,
    chat,
    client_of,
    data_url,
    post,
)
from support.recorder import FakeRecorder

CHAT = "/v1/chat/completions"


@pytest.fixture
def recorder() -> FakeRecorder:
    return FakeRecorder()


async def ask(
    recorder: FakeRecorder, route: str, body: object, backend: FakeBackend | None = None
) -> httpx.Response:
    async with client_of(backend or FakeBackend(), recorder=recorder) as client:
        return await post(client, route, body)


def counted(recorder: FakeRecorder, metric: metrics.Counter) -> dict[tuple[str, ...], float]:
    """The counts of one metric by the values of its labels."""
    return {key[1:]: value for key, value in recorder.counted.items() if key[0] == metric.name}


def observed(recorder: FakeRecorder, metric: metrics.Histogram, *labels: str) -> list[float]:
    return recorder.observed[metric.name, *labels]


@pytest.mark.parametrize("route", ROUTES)
async def test_an_answer_is_counted_and_timed_by_route(recorder: FakeRecorder, route: str) -> None:
    await ask(recorder, route, body_for(route))

    assert counted(recorder, metrics.REQUESTS) == {(route, "ok"): 1}
    (seconds,) = observed(recorder, metrics.REQUEST_DURATION, route)
    assert 0 < seconds < 60


@pytest.mark.parametrize(
    ("failure", "outcome", "reason"),
    [
        pytest.param(Overloaded("full"), "overloaded", "overloaded", id="queue full"),
        pytest.param(Unavailable("lost"), "unavailable", "unavailable", id="replica lost"),
        pytest.param(
            ContextLengthExceeded("long"), "invalid", "context_length_exceeded", id="too long"
        ),
        pytest.param(TimedOut("late"), "cancelled", "timeout", id="its time was over"),
        pytest.param(Quarantined("deadly"), "error", "quarantined", id="replicas died of it"),
        pytest.param(ZeroDivisionError(), "error", None, id="a bug"),
    ],
)
async def test_a_failure_is_counted_by_outcome_and_reason(
    recorder: FakeRecorder, failure: Exception, outcome: str, reason: str | None
) -> None:
    await ask(recorder, CHAT, chat(), FakeBackend(generation_failure=failure))

    assert counted(recorder, metrics.REQUESTS) == {(CHAT, outcome): 1}
    assert counted(recorder, metrics.REJECTIONS) == ({(reason,): 1} if reason else {})


@pytest.mark.parametrize(
    ("path", "body", "route"),
    [
        pytest.param(CHAT, chat(nonsense=1), CHAT, id="an unknown field"),
        pytest.param(CHAT, b"{", CHAT, id="malformed JSON"),
        pytest.param("/v1/nothing/here", {}, "other", id="an unknown path"),
        pytest.param(CHAT, chat(model="another"), CHAT, id="another model"),
    ],
)
async def test_a_bad_request_is_invalid_but_not_a_rejection(
    recorder: FakeRecorder, path: str, body: object, route: str
) -> None:
    await ask(recorder, path, body)

    assert counted(recorder, metrics.REQUESTS) == {(route, "invalid"): 1}
    assert counted(recorder, metrics.REJECTIONS) == {}


async def test_model_names_in_paths_make_no_new_labels(recorder: FakeRecorder) -> None:
    async with client_of(FakeBackend(), recorder=recorder) as client:
        for name in ("a", "b/c"):
            await client.get(f"/v1/models/{name}")

    assert counted(recorder, metrics.REQUESTS) == {("/v1/models/{name:path}", "invalid"): 2}


@pytest.mark.parametrize(
    ("url", "kind"),
    [
        pytest.param("data:image/png,x", "url", id="a data URL without base64"),
        pytest.param("data:image/png;base64,?", "base64", id="invalid base64"),
        pytest.param("data:image/png;base64,", "empty", id="no bytes"),
        pytest.param(data_url(b"odd"), "format", id="what the preprocessor cannot decode"),
    ],
)
async def test_image_errors_are_counted_by_kind(
    recorder: FakeRecorder, url: str, kind: str
) -> None:
    backend = FakeBackend(failures={b"odd": InvalidImage("odd", kind="format")})
    await ask(recorder, "/v1/caption", {"image": url}, backend)

    assert counted(recorder, metrics.IMAGE_ERRORS) == {(kind,): 1}


async def test_each_of_several_image_errors_counts_once(recorder: FakeRecorder) -> None:
    bad = {name: InvalidImage("bad", kind="broken") for name in (b"1", b"2")}
    for images, failures in (((b"1", b"2", b"good"), 2), ((b"1", b"2"), 4)):
        body = {"images": [data_url(image) for image in images]}
        await ask(recorder, "/v1/caption", body, FakeBackend(failures={**bad}))
        assert counted(recorder, metrics.IMAGE_ERRORS) == {("broken",): failures}

    assert counted(recorder, metrics.REQUESTS) == {
        ("/v1/caption", "ok"): 1,
        ("/v1/caption", "invalid"): 1,
    }


@pytest.mark.parametrize("n", [1, 2])
async def test_a_stream_has_one_time_to_first_token_and_latencies_of_the_others(
    recorder: FakeRecorder, n: int
) -> None:
    body = chat(stream=True, n=n, temperature=1.0 if n > 1 else 0.0)
    await ask(recorder, CHAT, body)

    assert len(observed(recorder, metrics.TIME_TO_FIRST_TOKEN, CHAT)) == 1
    assert len(observed(recorder, metrics.INTER_TOKEN_LATENCY, CHAT)) == n * (len(TOKEN_IDS) - 1)
    assert counted(recorder, metrics.REQUESTS) == {(CHAT, "ok"): 1}


async def test_a_whole_answer_has_no_token_times(recorder: FakeRecorder) -> None:
    await ask(recorder, CHAT, chat())

    assert observed(recorder, metrics.TIME_TO_FIRST_TOKEN, CHAT) == []
    assert observed(recorder, metrics.INTER_TOKEN_LATENCY, CHAT) == []


async def test_a_stream_that_breaks_does_not_count_as_ok(recorder: FakeRecorder) -> None:
    response = await ask(recorder, CHAT, chat(stream=True), FakeBackend(stream_fails_after=2))

    assert response.status_code == 200
    assert counted(recorder, metrics.REQUESTS) == {(CHAT, "unavailable"): 1}


async def test_a_disconnected_client_is_counted_as_cancelled(recorder: FakeRecorder) -> None:
    backend = FakeBackend(endless=True)
    app = create_app(backend, AppConfig(), recorder)
    begun = asyncio.Event()

    async def call() -> None:
        transport = httpx.ASGITransport(app)
        async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
            begun.set()
            await client.post(CHAT, json=chat(stream=True))

    task = asyncio.create_task(call())
    await begun.wait()
    while not observed(recorder, metrics.INTER_TOKEN_LATENCY, CHAT):
        await asyncio.sleep(0)
    task.cancel()
    with suppress(asyncio.CancelledError):
        await task
    assert counted(recorder, metrics.REQUESTS) == {(CHAT, "cancelled"): 1}


async def test_a_client_that_leaves_while_it_sends_is_counted_as_cancelled(
    recorder: FakeRecorder,
) -> None:
    messages = iter(
        [
            {"type": "http.request", "body": b"{", "more_body": True},
            {"type": "http.disconnect"},
        ]
    )

    async def receive() -> Any:
        return next(messages)

    async def send(_: Any) -> None:
        await asyncio.sleep(0)

    scope = {"type": "http", "method": "POST", "path": CHAT, "headers": []}
    scope |= {"query_string": b"", "http_version": "1.1"}
    await create_app(FakeBackend(), AppConfig(), recorder)(scope, receive, send)

    assert counted(recorder, metrics.REQUESTS) == {(CHAT, "cancelled"): 1}


async def test_an_error_while_receiving_is_counted_as_cancelled(
    recorder: FakeRecorder,
) -> None:
    """Ray Serve raises an error of its own there."""
    body = json.dumps(chat(stream=True)).encode()
    messages = iter([{"type": "http.request", "body": body, "more_body": False}])

    async def receive() -> Any:
        while not observed(recorder, metrics.INTER_TOKEN_LATENCY, CHAT):
            if (message := next(messages, None)) is not None:
                return message
            await asyncio.sleep(0)
        raise ConnectionError("the task was cancelled")

    async def send(_: Any) -> None:
        await asyncio.sleep(0)

    headers = [(b"content-length", str(len(body)).encode())]
    scope = {"type": "http", "method": "POST", "path": CHAT, "headers": headers}
    scope |= {"query_string": b"", "http_version": "1.1"}
    app = create_app(FakeBackend(endless=True), AppConfig(), recorder)
    with suppress(Exception):
        await app(scope, receive, send)

    assert counted(recorder, metrics.REQUESTS) == {(CHAT, "cancelled"): 1}


async def test_a_body_that_is_too_large_is_invalid_and_a_rejection(
    recorder: FakeRecorder,
) -> None:
    config = AppConfig.model_validate({"ingress": {"max_body_bytes": 100}})
    async with client_of(FakeBackend(), config, recorder) as client:
        await post(client, CHAT, chat())

    assert counted(recorder, metrics.REQUESTS) == {(CHAT, "invalid"): 1}
    assert counted(recorder, metrics.REJECTIONS) == {("request_too_large",): 1}


async def test_the_metrics_page_is_made_of_the_nodes_pages() -> None:
    backend = FakeBackend(metrics_pages={"a": "http://127.0.0.1:9/metrics"})
    async with client_of(backend) as client:
        response = await client.get("/metrics")

    assert response.status_code == 200
    assert response.headers["content-type"].startswith("text/plain; version=")
    assert 'ray_blip2_node_up{node="a"} 0.0' in response.text


@pytest.mark.parametrize(
    ("header", "seconds"), [(None, 10), ("4", 4), ("600", 10), ("nan", 10), ("soon", 10)]
)
def test_nodes_are_awaited_as_long_as_prometheus_waits(header: str | None, seconds: float) -> None:
    fields = [(b"x-prometheus-scrape-timeout-seconds", header.encode())] if header else []

    assert scrape_timeout_s(Request({"type": "http", "headers": fields})) == seconds


def test_the_kind_of_an_image_error_survives_pickling() -> None:
    import pickle

    error = pickle.loads(pickle.dumps(InvalidImage("bad", "image", kind="pixels")))

    assert (error.message, error.param, error.kind) == ("bad", "image", "pixels")
    assert isinstance(error, Blip2ServeError)
