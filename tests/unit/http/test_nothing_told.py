"""What clients send and get stands in no log, label or error."""

from __future__ import annotations

import base64
import logging
from typing import Any

import httpx
import pytest

from blip2_serve.config import AppConfig
from blip2_serve.errors import InvalidImage, Unavailable
from blip2_serve.http.api import create_app
from support.fake_backend import ROUTES, FakeBackend, client_of_app, data_url, post
from support.recorder import FakeRecorder

KEY, PROMPT, PICTURE, ANSWER = "blip2-kkkkey", "ppprompt", b"iiimage", "iiimage:"
SECRETS = [KEY, PROMPT, PICTURE.decode(), base64.b64encode(PICTURE).decode(), PICTURE.hex()]


def body_of(route: str, **more: Any) -> dict[str, Any]:
    url = data_url(PICTURE)
    if "chat" not in route:
        return {"image": url, "prompt": PROMPT, **more}
    parts = [{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": PROMPT}]
    return {"messages": [{"role": "user", "content": parts}], **more}


CHANGES: list[dict[str, Any]] = [
    {},
    {"stream": True},
    {"temperature": PROMPT},
    {"max_tokens": [PROMPT]},
    {"stop": [PROMPT] * 99},
    {"stop": {"x": PROMPT}},
    {"image": PROMPT},
    {"prompt": {"x": PROMPT}},
    {"prompt": PROMPT, "messages": PROMPT},
    {"messages": [{"role": "nobody", "content": PROMPT}]},
    {"messages": [{"role": "user", "content": [{"type": "video", "text": PROMPT}]}]},
]


@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize("change", CHANGES, ids=[str(change)[:30] for change in CHANGES])
@pytest.mark.parametrize(
    "failure",
    [
        None,
        InvalidImage("the image is broken", "image"),
        Unavailable("no replica"),
        ValueError(f"{PROMPT} {PICTURE!r}"),
    ],
    ids=["it works", "a broken picture", "no replica", "a bug that quotes it"],
)
async def test_what_clients_send_and_get_is_told_to_nobody(
    route: str, change: dict[str, Any], failure: Exception | None, caplog: pytest.LogCaptureFixture
) -> None:
    recorder = FakeRecorder()
    backend = FakeBackend(failures={PICTURE: failure} if failure else {})
    app = create_app(backend, AppConfig(), recorder)
    with caplog.at_level(logging.DEBUG):
        async with client_of_app(app) as client:
            client.headers["authorization"] = f"Bearer {KEY}"
            answer = await post(client, route, body_of(route, **change))
    told = caplog.text + str(vars(recorder)) + str(answer.headers)
    if answer.status_code != httpx.codes.OK:
        told += answer.text
    assert not [secret for secret in SECRETS if secret in told], told
