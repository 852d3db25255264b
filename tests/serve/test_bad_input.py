"""Bad input gets a 4xx error that names the field, and does not stop the server."""

from __future__ import annotations

import json
from typing import Any

import pytest

from blip2_serve.demo import scenes
from support.images import data_url, encode, image_message
from support.server import App

SCENE = scenes.sample(4_001).image
GOOD = data_url(SCENE)
OTHER = data_url(scenes.sample(4_002).image)
PNG = encode(SCENE)


def chat(*messages: dict[str, Any], **more: Any) -> dict[str, Any]:
    return {"messages": list(messages) or [image_message(SCENE)], **more}


def generate(**more: Any) -> dict[str, Any]:
    return {"image": GOOD, **more}


CASES: dict[str, tuple[str, Any, str | None]] = {
    "truncated image": ("/v1/generate", {"image": data_url(PNG[: len(PNG) // 2])}, "image"),
    "truncated image in a chat": (
        "/v1/chat/completions",
        chat(image_message(PNG[: len(PNG) // 2])),
        "messages",
    ),
    "text sent as a PNG": ("/v1/caption", {"image": data_url(b"I am a PNG")}, "image"),
    "invalid base64": ("/v1/generate", {"image": "data:image/png;base64,@@@"}, "image"),
    "file URL": ("/v1/generate", {"image": "file:///etc/passwd"}, "image"),
    "https URL while fetching is off": ("/v1/generate", {"image": "https://a.b/c.png"}, "image"),
    "unknown parameter": ("/v1/generate", generate(foo=1), "foo"),
    "min_tokens above max_tokens": (
        "/v1/generate",
        generate(min_tokens=5, max_tokens=4),
        "min_tokens",
    ),
    "two different limits": (
        "/v1/chat/completions",
        chat(max_tokens=4, max_completion_tokens=5),
        "max_completion_tokens",
    ),
    "two different images in one chat": (
        "/v1/chat/completions",
        chat(
            {
                "role": "user",
                "content": [
                    {"type": "image_url", "image_url": {"url": GOOD}},
                    {"type": "image_url", "image_url": {"url": OTHER}},
                ],
            }
        ),
        "messages",
    ),
    "chat without an image": (
        "/v1/chat/completions",
        chat({"role": "user", "content": "hi"}),
        "messages",
    ),
    "no image": ("/v1/generate", {"prompt": "hi"}, "image"),
    "no message": ("/v1/chat/completions", {"messages": []}, "messages"),
    "min_tokens beyond the model's positions": (
        "/v1/generate",
        generate(prompt="red " * 100, max_tokens=500, min_tokens=500),
        "min_tokens",
    ),
    "bias of a token id beyond the vocabulary": (
        "/v1/chat/completions",
        chat(logit_bias={"416": 1}),
        "logit_bias",
    ),
    "prompt beyond the model's positions": (
        "/v1/generate",
        generate(prompt="red " * 600),
        "prompt",
    ),
    "max_tokens 0": ("/v1/generate", generate(max_tokens=0), "max_tokens"),
    "negative max_tokens": ("/v1/chat/completions", chat(max_tokens=-3), "max_tokens"),
    "temperature NaN": ("/v1/generate", generate(temperature=float("nan")), "temperature"),
    "temperature infinite": ("/v1/generate", generate(temperature=float("inf")), "temperature"),
    "unknown role": (
        "/v1/chat/completions",
        chat({"role": "wizard", "content": "hi"}),
        "messages",
    ),
    "unknown model": ("/v1/generate", generate(model="gpt-5"), "model"),
    "sampled beams": ("/v1/generate", generate(num_beams=5, temperature=1), "temperature"),
    "more answers than beams": ("/v1/generate", generate(num_beams=2, n=3), "n"),
    "top_logprobs without logprobs": (
        "/v1/chat/completions",
        chat(top_logprobs=2),
        "top_logprobs",
    ),
    "empty body": ("/v1/chat/completions", b"", None),
    "truncated body": ("/v1/generate", b'{"image": "data:', None),
    "list": ("/v1/caption", [], None),
    "deep nesting": ("/v1/generate", b'{"a":' * 100_000, None),
    "invalid UTF-8": ("/v1/generate", b'{"image": "\xff\xfe"}', None),
}


@pytest.mark.parametrize("stream", [False, True], ids=["unary", "streaming"])
@pytest.mark.parametrize("name", CASES)
def test_bad_input_gets_an_openai_error_that_names_the_field(
    name: str, stream: bool, demo: App
) -> None:
    path, body, param = CASES[name]
    if stream and (not isinstance(body, dict) or path == "/v1/caption"):
        body = body if path != "/v1/caption" else {"images": [GOOD], "stream": True}
        param = param if path != "/v1/caption" else "stream"
    elif stream:
        body = {**body, "stream": True}
    content = body if isinstance(body, bytes) else json.dumps(body).encode()
    response = demo.post(path, content=content, headers={"content-type": "application/json"})
    assert 400 <= response.status_code < 500, response.text
    assert response.headers["content-type"] == "application/json"
    error = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert error["type"] == "invalid_request_error"
    assert error["message"]
    if param:
        assert error["param"] == param
    assert demo.post("/v1/caption", json={"image": GOOD}).status_code == 200


def test_the_image_token_in_a_prompt_is_plain_text(demo: App) -> None:
    plain = demo.post("/v1/generate", json=generate(prompt="what is it"))
    special = demo.post("/v1/generate", json=generate(prompt="what <image></s> is it"))
    assert special.status_code == 200, special.text
    tokens = [r.json()["usage"]["prompt_tokens"] for r in (plain, special)]
    assert tokens[1] > tokens[0] + 2  # more than two special tokens
