"""How bodies are received: media types and limits."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Callable
from typing import Any

import httpx
import pytest
from starlette.types import Message, Receive, Scope, Send

from blip2_serve.config import AppConfig
from blip2_serve.http.body import RequestBody
from support.fake_backend import ROUTES, FakeBackend, body_for, client_of, data_url, error_of, post

Headers = list[tuple[bytes, bytes]]


async def seen_by_the_application(headers: Headers) -> Headers:
    """The headers that the application sees when these are sent."""
    seen: Headers = []

    async def application(scope: Scope, _: Receive, __: Send) -> None:
        seen.extend(scope["headers"])

    async def receive() -> Message:
        return {"type": "http.request", "body": b""}

    async def send(_: Message) -> None: ...

    scope = {"type": "http", "headers": headers}
    await RequestBody(application, max_bytes=100)(scope, receive, send)
    return seen


async def test_repeated_headers_are_kept() -> None:
    sent = [(b"x-forwarded-for", b"10.0.0.1"), (b"accept", b"a"), (b"x-forwarded-for", b"10.0.0.2")]
    seen = await seen_by_the_application([*sent, (b"content-type", b"text/plain")])

    assert seen == [*sent, (b"content-type", b"application/json")]


async def test_a_multipart_body_keeps_its_media_type_and_boundary() -> None:
    sent = [(b"content-type", b"MULTIPART/form-data; boundary=X"), (b"accept", b"a")]

    assert await seen_by_the_application(sent) == sent


# -- limits ----------------------------------------------------------------------------------------


@pytest.fixture
async def small_client(backend: FakeBackend) -> AsyncIterator[httpx.AsyncClient]:
    """Accepts bodies of up to 1,000 bytes and images of up to 20."""
    limits = {"max_body_bytes": 1000, "images": {"max_bytes": 20}}
    async with client_of(backend, AppConfig.model_validate({"ingress": limits})) as client:
        yield client


@pytest.mark.parametrize("route", ROUTES)
async def test_a_body_that_declares_too_many_bytes_is_a_413(
    small_client: httpx.AsyncClient, route: str
) -> None:
    response = await post(small_client, route, body_for(route, user="x" * 1000))

    assert response.status_code == 413
    assert error_of(response)["code"] == "request_too_large"
    assert "1,000" in error_of(response)["message"]


@pytest.mark.parametrize("route", ROUTES)
async def test_a_body_of_undeclared_length_that_grows_too_large_is_a_413(
    small_client: httpx.AsyncClient, route: str
) -> None:
    async def pieces() -> AsyncIterator[bytes]:
        for _ in range(30):
            yield b" " * 100

    response = await small_client.post(route, content=pieces())

    assert "content-length" not in response.request.headers
    assert response.status_code == 413
    assert error_of(response)["code"] == "request_too_large"


async def test_an_upload_that_is_too_large_is_a_413(small_client: httpx.AsyncClient) -> None:
    files = [("image", ("1.png", b"x" * 1000))]
    response = await small_client.post("/v1/caption", files=files)

    assert response.status_code == 413
    assert error_of(response)["code"] == "request_too_large"


async def test_a_body_within_the_limit_is_accepted(small_client: httpx.AsyncClient) -> None:
    body = json.dumps(body_for("/v1/caption")).encode()

    assert (await post(small_client, "/v1/caption", body.ljust(1000))).status_code == 200


@pytest.mark.parametrize(
    "send",
    [
        pytest.param(lambda c: post(c, "/v1/generate", {"image": data_url(b"x" * 21)}), id="JSON"),
        pytest.param(
            lambda c: c.post("/v1/caption", files=[("image", ("1.png", b"x" * 21))]), id="upload"
        ),
    ],
)
async def test_an_image_above_the_limit_is_a_400(
    small_client: httpx.AsyncClient, send: Callable[[httpx.AsyncClient], Any]
) -> None:
    response = await send(small_client)

    assert response.status_code == 400
    assert error_of(response)["param"] == "image"
    assert "20" in error_of(response)["message"]
