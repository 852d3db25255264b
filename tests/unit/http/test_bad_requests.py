"""Bad requests get a 4xx that names the field."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import httpx
import pytest

from blip2_serve.config import AppConfig
from blip2_serve.errors import (
    Blip2ServeError,
    ContextLengthExceeded,
    InvalidImage,
)
from blip2_serve.http.images import ImageReader
from support.fake_backend import (
    ROUTES,
    FakeBackend,
    body_for,
    chat,
    client_of,
    data_url,
    error_of,
    image_part,
    post,
    user,
)


@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize(
    "body",
    [
        pytest.param(b"", id="empty body"),
        pytest.param(b"hello", id="not JSON"),
        pytest.param(b'{"image": ', id="half a JSON object"),
        pytest.param(b"\xff\xfe{}", id="not UTF-8"),
        pytest.param(b"[]", id="a JSON array"),
        pytest.param(b"null", id="a JSON null"),
        pytest.param(b"[" * 100_000, id="endless brackets"),
    ],
)
async def test_a_body_that_is_not_a_json_object_is_a_400(
    client: httpx.AsyncClient, route: str, body: bytes
) -> None:
    response = await post(client, route, body)

    assert response.status_code == 400
    assert error_of(response)["type"] == "invalid_request_error"


@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize(
    ("more", "param"),
    [
        pytest.param({"max_tokens": 0}, "max_tokens", id="max_tokens 0"),
        pytest.param({"max_tokens": -1}, "max_tokens", id="negative max_tokens"),
        pytest.param({"max_tokens": 2.5}, "max_tokens", id="fractional max_tokens"),
        pytest.param({"min_tokens": 6, "max_tokens": 5}, "min_tokens", id="min above max"),
        pytest.param({"temperature": float("nan")}, "temperature", id="NaN temperature"),
        pytest.param({"temperature": float("inf")}, "temperature", id="infinite temperature"),
        pytest.param({"temperature": -0.5}, "temperature", id="negative temperature"),
        pytest.param({"temperature": 3}, "temperature", id="temperature above 2"),
        pytest.param({"temperature": 1, "top_p": -0.1}, "top_p", id="negative top_p"),
        pytest.param({"min_p": 0.5}, "min_p", id="min_p without temperature"),
        pytest.param({"presence_penalty": 3}, "presence_penalty", id="presence penalty 3"),
        pytest.param({"frequency_penalty": "much"}, "frequency_penalty", id="a word as penalty"),
        pytest.param({"logit_bias": {"9": 200}}, "logit_bias", id="bias above 100"),
        pytest.param({"logit_bias": {"red": 1}}, "logit_bias", id="bias of a word"),
        pytest.param({"n": 3, "num_beams": 2}, "n", id="more answers than beams"),
        pytest.param({"n": 17, "temperature": 1}, "n", id="too many answers"),
        pytest.param({"num_beams": 9}, "num_beams", id="too many beams"),
        pytest.param({"num_beams": 2, "temperature": 1}, "temperature", id="sampled beams"),
        pytest.param({"length_penalty": 2}, "length_penalty", id="length penalty without beams"),
        pytest.param({"early_stopping": True}, "early_stopping", id="early stopping without beams"),
        pytest.param(
            {"num_beams": 2, "early_stopping": "maybe"},
            "early_stopping",
            id="unknown value",
        ),
        pytest.param({"preset": "haiku"}, "preset", id="an unknown preset"),
        pytest.param({"repetition_penalty": 0}, "repetition_penalty", id="repetition penalty 0"),
        pytest.param({"stop": ["\n"] * 17}, "stop", id="too many stop strings"),
        pytest.param({"stop": 5}, "stop", id="a number as stop string"),
        pytest.param({"temprature": 1}, "temprature", id="misspelled parameter"),
    ],
)
async def test_an_invalid_parameter_is_a_400_that_names_it(
    client: httpx.AsyncClient,
    backend: FakeBackend,
    route: str,
    more: dict[str, Any],
    param: str,
) -> None:
    response = await post(client, route, body_for(route, **more))

    error = error_of(response)
    assert response.status_code == 400
    assert error["type"] == "invalid_request_error"
    assert error["param"] == param
    assert param in error["message"]
    assert backend.prompts == []


@pytest.mark.parametrize("route", ROUTES)
async def test_an_error_message_starts_with_the_field_as_the_client_wrote_it(
    client: httpx.AsyncClient, route: str
) -> None:
    one = error_of(await post(client, route, body_for(route, stop=5)))
    several = error_of(await post(client, route, body_for(route, stop=["a", 5])))

    assert one["message"].startswith("stop: ")
    assert several["message"].startswith("stop[1]: ")


@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize(
    "url",
    [
        pytest.param("data:image/png;base64,@@@@", id="invalid base64"),
        pytest.param("data:image/png;base64,aGkxM", id="truncated base64"),
        pytest.param("data:image/png,aGk=", id="a data URL without base64"),
        pytest.param("data:image/png;base64", id="a data URL without data"),
        pytest.param("data:image/png;base64,", id="an empty image"),
        pytest.param("aGk=", id="base64 without a data URL"),
        pytest.param("", id="an empty URL"),
        pytest.param("http://example.com/a.png", id="an http URL"),
        pytest.param("file:///etc/passwd", id="file URL"),
    ],
)
async def test_an_invalid_image_url_is_a_400_that_names_the_field(
    client: httpx.AsyncClient, backend: FakeBackend, route: str, url: str
) -> None:
    body = body_for(route)
    if "chat" in route:
        body["messages"][0]["content"][0]["image_url"]["url"] = url
    else:
        body["image"] = url
    response = await post(client, route, body)

    assert response.status_code == 400
    assert error_of(response)["param"] == ("messages" if "chat" in route else "image")
    assert backend.encoded == []


@pytest.mark.parametrize("route", ROUTES)
async def test_an_error_about_https_urls_names_the_flag_that_allows_them(
    client: httpx.AsyncClient, route: str
) -> None:
    text = json.dumps(body_for(route)).replace(data_url(b"picture"), "https://example.com/a.png")
    response = await post(client, route, text.encode())

    assert response.status_code == 400
    assert "--allow-image-urls" in error_of(response)["message"]


async def test_a_chat_with_several_image_urls_downloads_none_of_them(
    monkeypatch: pytest.MonkeyPatch, backend: FakeBackend
) -> None:
    downloaded: list[str] = []

    async def download(_: ImageReader, url: str, __: str) -> bytes:
        downloaded.append(url)
        return b"picture"

    monkeypatch.setattr(ImageReader, "_download", download)
    config = AppConfig.model_validate({"ingress": {"images": {"allow_urls": True}}})
    part = {"type": "image_url", "image_url": {"url": "https://example.com/0.png"}}
    others = [{"type": "image_url", "image_url": {"url": f"https://b.c/{i}"}} for i in range(50)]
    async with client_of(backend, config) as client:
        for more in (others, [image_part()]):
            messages = [{"role": "user", "content": [part, *more]}]
            response = await client.post("/v1/chat/completions", json={"messages": messages})
            assert response.status_code == 400
            assert error_of(response)["param"] == "messages"
        assert downloaded == []
        messages = [{"role": "user", "content": [part, part]}]  # as in later turns
        response = await client.post("/v1/chat/completions", json={"messages": messages})
        assert response.status_code == 200
    assert downloaded == ["https://example.com/0.png"]


async def test_a_shared_failure_names_the_field_of_each_request(
    client: httpx.AsyncClient, backend: FakeBackend
) -> None:
    backend.failures[b"picture"] = InvalidImage(
        "not an image"
    )  # one object, as when requests share one encoding
    backend.together = asyncio.Barrier(len(ROUTES))
    async with asyncio.timeout(10), asyncio.TaskGroup() as group:
        asked = [group.create_task(post(client, route, body_for(route))) for route in ROUTES]

    fields = [error_of(task.result())["param"] for task in asked]
    assert fields == ["messages" if "chat" in route else "image" for route in ROUTES]


@pytest.mark.parametrize("route", ROUTES)
async def test_an_image_that_cannot_be_decoded_is_a_400_that_names_its_field(
    client: httpx.AsyncClient, backend: FakeBackend, route: str
) -> None:
    backend.failures[b"picture"] = InvalidImage("not an image")
    response = await post(client, route, body_for(route))

    assert response.status_code == 400
    assert error_of(response) == {
        "message": "not an image",
        "type": "invalid_request_error",
        "param": "messages" if "chat" in route else "image",
        "code": "invalid_image",
    }


@pytest.mark.parametrize(
    ("error", "sent", "param"),
    [
        pytest.param(
            ContextLengthExceeded("too long", "prompt"), {}, "messages", id="prompt too long"
        ),
        pytest.param(
            ContextLengthExceeded("too long", "max_tokens"),
            {"max_completion_tokens": 9},
            "max_completion_tokens",
            id="max_tokens too high",
        ),
    ],
)
async def test_an_error_about_length_names_a_field_of_the_chat(
    client: httpx.AsyncClient,
    backend: FakeBackend,
    error: Blip2ServeError,
    sent: dict[str, Any],
    param: str,
) -> None:
    backend.generation_failure = error
    response = await post(client, "/v1/chat/completions", chat(**sent))

    assert error_of(response)["code"] == "context_length_exceeded"
    assert error_of(response)["param"] == param


ASSISTANT = {"role": "assistant", "content": "a circle"}


@pytest.mark.parametrize(
    ("body", "param"),
    [
        pytest.param({}, "messages", id="no messages"),
        pytest.param({"messages": []}, "messages", id="an empty list of messages"),
        pytest.param({"messages": "hello"}, "messages", id="messages is a string"),
        pytest.param({"messages": ["hello"]}, "messages", id="a message is a string"),
        pytest.param({"messages": [user()]}, "messages", id="no image"),
        pytest.param({"messages": [user(b"one", b"two")]}, "messages", id="two different images"),
        pytest.param(
            {"messages": [{"role": "judge", "content": "x"}]}, "messages", id="an unknown role"
        ),
        pytest.param({"messages": [{"content": "x"}]}, "messages", id="a message without a role"),
        pytest.param(
            {"messages": [{"role": "user", "content": []}]}, "messages", id="empty content"
        ),
        pytest.param(
            {"messages": [user(b"picture"), ASSISTANT]}, "messages", id="assistant message last"
        ),
        pytest.param(
            {"messages": [user(b"picture"), {"role": "tool", "content": "x"}]},
            "messages[1].role",
            id="a tool's message",
        ),
        pytest.param({"messages": [ASSISTANT]}, "messages", id="no user message"),
        pytest.param(
            {"messages": [{**user(b"picture"), "mood": "good"}]},
            "messages",
            id="an unknown field of a message",
        ),
        pytest.param(
            {"messages": [{"role": "user", "content": [image_part(alt="a circle")]}]},
            "messages",
            id="an unknown field of an image",
        ),
        pytest.param(
            {"messages": [{"role": "user", "content": [{"type": "smell"}]}]},
            "messages",
            id="an unknown kind of content",
        ),
        pytest.param(
            chat(max_tokens=5, max_completion_tokens=6),
            "max_completion_tokens",
            id="different limits",
        ),
        pytest.param(chat(logprobs=7), "logprobs", id="logprobs is a number"),
        pytest.param(chat(top_logprobs=3), "top_logprobs", id="top_logprobs without logprobs"),
        pytest.param(
            chat(logprobs=True, top_logprobs=21), "top_logprobs", id="too many top_logprobs"
        ),
        pytest.param(chat(tools=[{"type": "function"}]), "tools", id="tools"),
        pytest.param(
            chat(response_format={"type": "json_object"}),
            "response_format",
            id="JSON format",
        ),
        pytest.param(
            chat(stream_options={"include_usage": True}),
            "stream_options",
            id="stream options without a stream",
        ),
        pytest.param(
            chat(stream=True, stream_options={"usage": True}),
            "stream_options",
            id="an unknown stream option",
        ),
    ],
)
async def test_an_invalid_chat_is_a_400_that_names_the_field(
    client: httpx.AsyncClient, backend: FakeBackend, body: dict[str, Any], param: str
) -> None:
    response = await post(client, "/v1/chat/completions", body)

    error = error_of(response)
    assert response.status_code == 400
    assert error["type"] == "invalid_request_error"
    assert error["param"] == param
    assert backend.prompts == []


async def test_an_unknown_field_is_named_with_its_path(
    client: httpx.AsyncClient,
) -> None:
    body = {"messages": [{"role": "user", "content": [image_part(alt="a circle")]}]}
    response = await post(client, "/v1/chat/completions", body)

    assert "messages[0].content[0].image_url.alt" in error_of(response)["message"]


@pytest.mark.parametrize("route", ROUTES)
async def test_an_unknown_field_name_with_a_lone_surrogate_is_a_400(
    client: httpx.AsyncClient, route: str
) -> None:
    response = await post(client, route, body_for(route, **{"\ud800": 1}))

    assert response.status_code == 400
    assert error_of(response)["type"] == "invalid_request_error"


@pytest.mark.parametrize(
    ("route", "body"),
    [
        pytest.param(ROUTES[0], {"messages": [user(b"picture", text="\ud800")]}, id="in a chat"),
        pytest.param(ROUTES[0], chat(stop="\ud800"), id="in a stop string"),
        pytest.param(ROUTES[1], body_for(ROUTES[1], prompt="\ud800"), id="in a raw prompt"),
        pytest.param(ROUTES[2], body_for(ROUTES[2], prompt="\ud800"), id="in a caption's prompt"),
    ],
)
async def test_a_lone_surrogate_which_no_tokenizer_accepts_is_a_400(
    client: httpx.AsyncClient, backend: FakeBackend, route: str, body: dict[str, Any]
) -> None:
    response = await post(client, route, body)

    assert response.status_code == 400
    assert error_of(response)["type"] == "invalid_request_error"
    assert backend.prompts == []


FLOODS = {
    "messages": {"messages": [{"role": "user", "content": "a"}] * 1025},
    "parts": {"messages": [{"role": "user", "content": [{"type": "text", "text": "a"}] * 1025}]},
    "wrong messages": {"messages": [{}] * 100_000},
    "items": {"input": [{"role": "user", "content": "a"}] * 1025},
    "item parts": {
        "input": [{"role": "user", "content": [{"type": "input_text", "text": "a"}] * 1025}]
    },
    "unknown fields": {f"a{number}": 0 for number in range(100_000)},
}


@pytest.mark.parametrize("flood", FLOODS)
async def test_a_flood_of_small_things_is_refused(client: httpx.AsyncClient, flood: str) -> None:
    route = "/v1/responses" if "item" in flood else "/v1/chat/completions"
    response = await post(client, route, FLOODS[flood])

    assert response.status_code == 400
    assert len(response.content) < 1000
    if "fields" not in flood and "wrong" not in flood:
        assert "1024" in error_of(response)["message"]


@pytest.mark.parametrize("route", [*ROUTES, "/v1/responses"])
@pytest.mark.parametrize(
    "body", [b"[%b0]" % (b"0," * 250_001), b'{"a":[%b{}]}' % (b"{}," * 150_000)]
)
async def test_a_body_of_too_many_values_is_not_parsed(
    client: httpx.AsyncClient, route: str, body: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in ("body", "captions"):
        monkeypatch.setattr(f"blip2_serve.http.{module}.from_json", None)  # fails if it is called
    response = await post(client, route, body)

    assert response.status_code == 413
    assert "250,000 values" in error_of(response)["message"]


async def test_a_chat_of_many_short_turns_is_fine(client: httpx.AsyncClient) -> None:
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}] * 500
    messages = [user(b"picture"), *turns[1:], {"role": "user", "content": "c"}]
    response = await post(client, "/v1/chat/completions", {"messages": messages})

    assert response.status_code == 200
