"""Every answer says to browsers that it is only what it says it is."""

from __future__ import annotations

import httpx
import pytest
from starlette.types import Message

from blip2_serve.config import AppConfig
from blip2_serve.errors import Unavailable
from blip2_serve.http import gate
from support.fake_backend import FakeBackend, body_for, client_of, post


def is_secure(headers: httpx.Headers, *, page: bool = False) -> bool:
    policy = headers["content-security-policy"]
    assert ("default-src 'self'" in policy) is page
    assert ("default-src 'none'" in policy) is not page
    assert "frame-ancestors 'none'" in policy
    assert headers["x-frame-options"] == "DENY"
    assert headers["referrer-policy"] == "no-referrer"
    return headers["x-content-type-options"] == "nosniff"


async def test_answers_and_errors_have_them(
    client: httpx.AsyncClient, backend: FakeBackend
) -> None:
    body = body_for("/v1/generate")
    for sent, status in ((body, 200), ({**body, "stream": True}, 200), ({}, 400)):
        response = await post(client, "/v1/generate", sent)
        assert response.status_code == status
        assert is_secure(response.headers)
    for path, status in (("/health", 200), ("/v1/models", 200), ("/v1/nothing", 404)):
        response = await client.get(path)
        assert response.status_code == status
        assert is_secure(response.headers)
    backend.generation_failure = ZeroDivisionError()
    response = await post(client, "/v1/generate", body)
    assert response.status_code == 500
    assert is_secure(response.headers)


@pytest.mark.parametrize("path", ["/docs", "/redoc"])
async def test_pages_may_load_what_is_served_with_them(
    client: httpx.AsyncClient, path: str
) -> None:
    response = await client.get(path)

    assert response.status_code == 200
    assert is_secure(response.headers, page=True)


async def test_pages_of_other_origins_still_may_ask() -> None:
    config = AppConfig.model_validate({"ingress": {"cors_origins": ["https://a.example"]}})
    async with client_of(FakeBackend(), config) as client:
        response = await client.get("/v1/models", headers={"origin": "https://a.example"})

    assert response.headers["access-control-allow-origin"] == "https://a.example"
    assert is_secure(response.headers)


async def test_an_error_outside_of_the_application_has_them() -> None:
    sent: list[Message] = []

    async def send(message: Message) -> None:
        sent.append(message)

    await gate.answer(Unavailable("not there"), send)
    assert is_secure(httpx.Headers(sent[0]["headers"]))
