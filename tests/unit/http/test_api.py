"""The routes over a fake backend: what clients send, what they get back, what the stages see."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Callable
from typing import Any

import httpx
import pytest

from blip2_serve.config import AppConfig
from blip2_serve.errors import (
    Blip2ServeError,
    ContextLengthExceeded,
    InvalidImage,
    Overloaded,
)
from blip2_serve.http.api import create_app
from blip2_serve.http.images import ImageReader
from blip2_serve.types import (
    SamplingParams,
)
from support.fake_backend import (
    PROMPT_TOKENS,
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
    image_part,
    post,
    user,
)
from support.recorder import FakeRecorder


@pytest.fixture
def backend() -> FakeBackend:
    return FakeBackend()


@pytest.fixture
async def client(backend: FakeBackend) -> AsyncIterator[httpx.AsyncClient]:
    async with client_of(backend) as client:
        yield client


# -- whole answers ---------------------------------------------------------------------------------


async def test_a_chat_answer_is_openais_chat_completion_and_nothing_else(
    client: httpx.AsyncClient,
) -> None:
    response = await post(client, "/v1/chat/completions", chat())

    answer = response.json()
    assert response.status_code == 200
    assert answer.pop("id").startswith("chatcmpl-")
    assert isinstance(answer.pop("created"), int)
    assert answer == {
        "object": "chat.completion",
        "model": "demo",
        "choices": [
            {
                "index": 0,
                "message": {
                    "role": "assistant",
                    "content": f"picture:{TEXT}".strip(),
                    "refusal": None,
                },
                "logprobs": None,
                "finish_reason": "stop",
            }
        ],
        "usage": {
            "prompt_tokens": PROMPT_TOKENS,
            "completion_tokens": len(TOKEN_IDS),
            "total_tokens": PROMPT_TOKENS + len(TOKEN_IDS),
        },
    }


async def test_generate_answers_with_the_raw_text_as_openais_completions_do(
    client: httpx.AsyncClient, backend: FakeBackend
) -> None:
    body = {"image": data_url(b"picture"), "prompt": " as {it} is "}
    answer = (await post(client, "/v1/generate", body)).json()

    assert backend.prompts == [" as {it} is "]
    assert answer["id"].startswith("cmpl-")
    assert answer["object"] == "text_completion"
    assert answer["choices"] == [
        {"index": 0, "text": f" picture:{TEXT}", "logprobs": None, "finish_reason": "stop"}
    ]
    assert answer["usage"]["total_tokens"] == PROMPT_TOKENS + len(TOKEN_IDS)


async def test_two_answers_have_two_ids(client: httpx.AsyncClient) -> None:
    answers = [(await post(client, "/v1/chat/completions", chat())).json() for _ in range(2)]

    assert answers[0]["id"] != answers[1]["id"]


@pytest.mark.parametrize("route", ROUTES[:2])
async def test_token_ids_come_when_asked_for(client: httpx.AsyncClient, route: str) -> None:
    answer = (await post(client, route, body_for(route, return_token_ids=True))).json()

    assert answer["choices"][0]["token_ids"] == list(TOKEN_IDS)


@pytest.mark.parametrize("route", ROUTES[:2])
@pytest.mark.parametrize(
    "asked",
    [
        pytest.param({"n": 3, "temperature": 1}, id="samples"),
        pytest.param({"n": 3, "num_beams": 4}, id="the best of some beams"),
    ],
)
async def test_n_answers_are_n_choices(
    client: httpx.AsyncClient, route: str, asked: dict[str, Any]
) -> None:
    answer = (await post(client, route, body_for(route, **asked, return_token_ids=True))).json()

    choices = answer["choices"]
    assert [choice["index"] for choice in choices] == [0, 1, 2]
    texts = [c["text"] if "text" in c else c["message"]["content"] for c in choices]
    assert [text.strip()[-1] for text in texts] == ["e", "1", "2"]
    assert all(choice["token_ids"] == list(TOKEN_IDS) for choice in choices)
    assert all(choice["finish_reason"] == "stop" for choice in choices)
    assert answer["usage"]["prompt_tokens"] == PROMPT_TOKENS
    assert answer["usage"]["completion_tokens"] == 3 * len(TOKEN_IDS)


async def test_a_chat_gets_log_probabilities_when_it_asks_for_them(
    client: httpx.AsyncClient,
) -> None:
    body = chat(logprobs=True, top_logprobs=2)
    answer = (await post(client, "/v1/chat/completions", body)).json()

    content = answer["choices"][0]["logprobs"]["content"]
    assert "".join(token["token"] for token in content) == f" picture:{TEXT}"
    assert {token["logprob"] for token in content} == {-0.5}
    assert [len(token["top_logprobs"]) for token in content] == [2] * len(TOKEN_IDS)


async def test_a_generation_gets_log_probabilities_when_it_asks_for_them(
    client: httpx.AsyncClient,
) -> None:
    body = body_for("/v1/generate", logprobs=1)
    answer = (await post(client, "/v1/generate", body)).json()

    logprobs = answer["choices"][0]["logprobs"]
    text = answer["choices"][0]["text"]
    assert "".join(logprobs["tokens"]) == text
    assert logprobs["token_logprobs"] == [-0.5] * len(TOKEN_IDS)
    assert logprobs["top_logprobs"] == [{"?": -2.0}] * len(TOKEN_IDS)
    starts = logprobs["text_offset"]
    assert [text[at:].startswith(t) for at, t in zip(starts, logprobs["tokens"], strict=True)]


@pytest.mark.parametrize("route", ROUTES)
async def test_a_preset_reaches_the_backend_as_parameters(
    client: httpx.AsyncClient, backend: FakeBackend, route: str
) -> None:
    response = await post(client, route, body_for(route, preset="vqa", max_tokens=4, seed=0))

    assert response.status_code == 200, response.text
    assert backend.params == [SamplingParams(num_beams=5, max_tokens=4, length_penalty=0.0)]


@pytest.mark.parametrize(
    ("preset", "prompt"),
    [
        pytest.param("vqa", "Question: what is it? Short answer:", id="vqa"),
        pytest.param("caption", "Question: what is it? Answer:", id="caption"),
        pytest.param(None, "Question: what is it? Answer:", id="none"),
    ],
)
async def test_only_a_chat_with_preset_vqa_asks_for_a_short_answer(
    client: httpx.AsyncClient, backend: FakeBackend, preset: str | None, prompt: str
) -> None:
    await post(client, "/v1/chat/completions", chat(preset=preset))

    assert backend.prompts == [prompt]


@pytest.mark.parametrize("route", ROUTES)
async def test_what_the_client_asks_for_reaches_the_backend(
    client: httpx.AsyncClient, backend: FakeBackend, route: str
) -> None:
    asked = {"max_tokens": 7, "temperature": 0.5, "top_p": 0.9, "seed": 3, "stop": ["\n", "."]}

    assert (await post(client, route, body_for(route, **asked))).status_code == 200
    assert backend.encoded == [b"picture"]
    assert backend.params == [
        SamplingParams(max_tokens=7, temperature=0.5, top_p=0.9, seed=3, stop=("\n", "."))
    ]


async def test_the_chat_becomes_one_prompt(client: httpx.AsyncClient, backend: FakeBackend) -> None:
    turns = [
        user(b"picture", text="what is it?"),
        {"role": "assistant", "content": "a {circle}."},
        {"role": "user", "content": "what color?"},
    ]
    await post(client, "/v1/chat/completions", {"messages": turns})

    assert backend.prompts == [
        "Question: what is it? Answer: a {circle}. Question: what color? Answer:"
    ]


async def test_the_same_image_may_come_again_in_a_later_turn(
    client: httpx.AsyncClient, backend: FakeBackend
) -> None:
    other_media_type = image_part(b"picture")
    other_media_type["image_url"]["url"] = data_url(b"picture").replace("png", "jpeg")
    turns = [
        user(b"picture", b"picture"),
        {"role": "assistant", "content": "a circle"},
        {"role": "user", "content": [other_media_type, {"type": "text", "text": "and now?"}]},
    ]
    response = await post(client, "/v1/chat/completions", {"messages": turns})

    assert response.status_code == 200
    assert backend.encoded == [b"picture"]


ECHOED = {
    "role": "assistant",
    "content": "a circle",
    "refusal": None,
    "annotations": [],
    "audio": None,
    "function_call": None,
    "tool_calls": None,
}


@pytest.mark.parametrize(
    "more",
    [
        pytest.param({"user": "someone"}, id="the end user's name"),
        pytest.param({"metadata": {"a": "b"}}, id="metadata"),
        pytest.param({"store": True}, id="a wish to store"),
        pytest.param({"frequency_penalty": 0, "presence_penalty": 0.0}, id="penalties of zero"),
        pytest.param({"response_format": {"type": "text"}}, id="text as the response format"),
        pytest.param({"n": 1}, id="one choice"),
        pytest.param({"logprobs": False}, id="no log probabilities"),
        pytest.param({"tools": [], "tool_choice": "none"}, id="an empty list of tools"),
        pytest.param({"stream": False}, id="no stream"),
        pytest.param({"stop": None, "seed": None, "max_tokens": None}, id="nulls for defaults"),
        pytest.param({"temperature": 0, "top_p": 1}, id="a top_p that keeps everything"),
        pytest.param({"length_penalty": 1.0, "num_beams": 1}, id="one beam"),
        pytest.param({"max_tokens": 5, "max_completion_tokens": 5}, id="one limit by both names"),
        pytest.param({"model": "demo"}, id="the served model's name"),
        pytest.param(
            {
                "messages": [
                    {
                        "role": "user",
                        "content": [
                            image_part(detail="low"),
                            {"type": "text", "text": "what is it?"},
                        ],
                    }
                ]
            },
            id="an image's detail",
        ),
        pytest.param(
            {"messages": [user(b"picture"), ECHOED, {"role": "user", "content": "what color?"}]},
            id="an answer sent back with all its fields",
        ),
    ],
)
async def test_what_openais_clients_send_without_effect_is_accepted(
    client: httpx.AsyncClient, more: dict[str, Any]
) -> None:
    response = await post(client, "/v1/chat/completions", chat(**more))

    assert response.status_code == 200, response.text


async def test_json_is_read_as_json_where_curl_declares_a_form(client: httpx.AsyncClient) -> None:
    for route in ROUTES:
        response = await client.post(
            route,
            content=json.dumps(body_for(route)),
            headers={"content-type": "application/x-www-form-urlencoded"},
        )
        assert response.status_code == 200, response.text


# -- streams ---------------------------------------------------------------------------------------


async def test_a_streamed_chat_is_a_role_then_text_then_the_finish_reason(
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


async def test_a_streamed_chat_says_what_the_whole_answer_says(client: httpx.AsyncClient) -> None:
    whole = (await post(client, "/v1/chat/completions", chat())).json()
    events = events_of(await post(client, "/v1/chat/completions", chat(stream=True)))

    deltas = [event["choices"][0]["delta"].get("content", "") for event in events[:-1]]
    assert "".join(deltas) == whole["choices"][0]["message"]["content"]


async def test_a_streamed_generation_says_exactly_what_was_generated(
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
        pytest.param({"n": 2, "num_beams": 4}, id="the best of some beams"),
        pytest.param({"num_beams": 4}, id="the best answer"),
    ],
)
async def test_streamed_choices_say_what_the_whole_ones_say(
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
async def test_streamed_log_probabilities_are_those_of_the_whole_answer(
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
async def test_every_token_id_is_streamed_once(client: httpx.AsyncClient, route: str) -> None:
    body = body_for(route, stream=True, return_token_ids=True)
    events = events_of(await post(client, route, body))

    ids = [i for event in events[:-1] for i in event["choices"][0].get("token_ids", [])]
    assert ids == list(TOKEN_IDS)


@pytest.mark.parametrize("route", ROUTES[:2])
async def test_usage_is_streamed_last_when_asked_for(client: httpx.AsyncClient, route: str) -> None:
    body = body_for(route, stream=True, stream_options={"include_usage": True})
    *chunks, usage, done = events_of(await post(client, route, body))

    assert done == "[DONE]"
    assert usage["choices"] == []
    assert usage["usage"] == (await post(client, route, body_for(route))).json()["usage"]
    assert all(chunk["usage"] is None for chunk in chunks)


@pytest.mark.parametrize(
    ("failure", "status"),
    [
        pytest.param(Overloaded("try again later"), 503, id="the queue is full"),
        pytest.param(ContextLengthExceeded("too long"), 400, id="it is too long"),
    ],
)
async def test_an_error_before_the_first_token_is_a_status_in_a_stream_too(
    client: httpx.AsyncClient, backend: FakeBackend, failure: Blip2ServeError, status: int
) -> None:
    backend.generation_failure = failure
    for stream in (False, True):
        response = await post(client, "/v1/chat/completions", chat(stream=stream))

        assert response.status_code == status
        assert error_of(response) == failure.body()["error"]


async def test_an_error_within_a_stream_is_its_last_event(
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


@pytest.mark.parametrize("route", ROUTES[:2])
async def test_a_client_that_leaves_ends_the_generation(route: str) -> None:
    backend = FakeBackend(endless=True)
    started = asyncio.Event()
    unread = [{"type": "http.request", "body": json.dumps(body_for(route, stream=True)).encode()}]

    async def receive() -> dict[str, Any]:
        if unread:
            return unread.pop()
        await started.wait()
        return {"type": "http.disconnect"}

    async def send(message: dict[str, Any]) -> None:
        if message["type"] == "http.response.body":
            started.set()
        await asyncio.sleep(0)  # gives the disconnect a turn, as a socket would

    scope = {
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
    async with asyncio.timeout(5):
        await create_app(backend, AppConfig(), FakeRecorder())(scope, receive, send)
        await backend.stream_closed.wait()


# -- captions --------------------------------------------------------------------------------------


async def test_one_image_is_captioned(client: httpx.AsyncClient, backend: FakeBackend) -> None:
    body = {"image": data_url(b"one"), "prompt": "a photo of"}
    answer = (await post(client, "/v1/caption", body)).json()

    assert backend.prompts == ["a photo of"]
    assert answer == {
        "object": "caption.list",
        "model": "demo",
        "data": [{"index": 0, "caption": f"one:{TEXT}".strip(), "finish_reason": "stop"}],
        "usage": {
            "prompt_tokens": PROMPT_TOKENS,
            "completion_tokens": len(TOKEN_IDS),
            "total_tokens": PROMPT_TOKENS + len(TOKEN_IDS),
        },
    }


async def test_captions_come_with_token_ids_when_asked_for(client: httpx.AsyncClient) -> None:
    body = {"image": data_url(b"one"), "return_token_ids": True}
    answer = (await post(client, "/v1/caption", body)).json()

    assert answer["data"][0]["token_ids"] == list(TOKEN_IDS)


async def test_n_captions_of_an_image_come_the_best_first(client: httpx.AsyncClient) -> None:
    body = {"images": [data_url(b"one"), data_url(b"two")], "n": 2, "num_beams": 3}
    answer = (await post(client, "/v1/caption", body)).json()

    for item, name in zip(answer["data"], ("one", "two"), strict=True):
        best = f"{name}:{TEXT}".strip()
        assert item["caption"] == best
        assert item["captions"][0] == best
        assert item["captions"][1].startswith(best)
        assert item["captions"][1].endswith("1")
        assert len(item["captions"]) == 2
    assert answer["usage"]["prompt_tokens"] == 2 * PROMPT_TOKENS
    assert answer["usage"]["completion_tokens"] == 2 * 2 * len(TOKEN_IDS)


async def test_several_images_get_one_result_or_one_error_each_in_their_order(
    client: httpx.AsyncClient, backend: FakeBackend
) -> None:
    backend.failures[b"broken"] = InvalidImage("not an image")
    images = [data_url(b"one"), data_url(b"broken"), "not a URL", data_url(b"two")]
    response = await post(client, "/v1/caption", {"images": images, "prompt": "a photo of"})

    answer = response.json()
    assert response.status_code == 200
    assert [item["index"] for item in answer["data"]] == [0, 1, 2, 3]
    assert answer["data"][0]["caption"].startswith("one:")
    assert answer["data"][1]["error"]["message"] == "not an image"
    assert answer["data"][1]["error"]["code"] == "invalid_image"
    assert "data URL" in answer["data"][2]["error"]["message"]
    assert answer["data"][3]["caption"].startswith("two:")
    assert answer["usage"]["prompt_tokens"] == 2 * PROMPT_TOKENS
    assert backend.prompts == ["a photo of", "a photo of"]


async def test_where_every_image_fails_the_answer_has_the_first_ones_status(
    client: httpx.AsyncClient, backend: FakeBackend
) -> None:
    backend.failures = {b"one": Overloaded("busy"), b"two": InvalidImage("not an image")}
    response = await post(client, "/v1/caption", {"images": [data_url(b"one"), data_url(b"two")]})

    assert response.status_code == 503
    assert error_of(response)["code"] == "overloaded"


async def test_uploads_are_captioned_with_form_fields_as_parameters(
    client: httpx.AsyncClient, backend: FakeBackend
) -> None:
    fields = {
        "prompt": "a photo of",
        "max_tokens": "5",
        "temperature": "0.5",
        "seed": "3",
        "stop": ["\n", "."],
        "return_token_ids": "true",
    }
    files = [("image", ("1.png", b"one")), ("image", ("2.png", b"two"))]
    response = await client.post("/v1/caption", files=files, data=fields)

    assert response.status_code == 200, response.text
    items = response.json()["data"]
    assert [item["caption"].partition(":")[0] for item in items] == ["one", "two"]
    assert items[0]["token_ids"] == list(TOKEN_IDS)
    expected = SamplingParams(max_tokens=5, temperature=0.5, seed=3, stop=("\n", "."))
    assert backend.params == [expected, expected]
    assert backend.prompts == ["a photo of", "a photo of"]


@pytest.mark.parametrize(
    "field",
    [
        pytest.param({"n": "1"}, id="one choice"),
        pytest.param({"num_beams": "1"}, id="one beam"),
        pytest.param({"length_penalty": "1"}, id="a length penalty of one"),
        pytest.param({"length_penalty": "1.0"}, id="a length penalty of one point zero"),
        pytest.param({"early_stopping": "false"}, id="no early stopping"),
        pytest.param({"num_beams": "3", "early_stopping": "true"}, id="early stopping"),
        pytest.param({"num_beams": "3", "early_stopping": "never"}, id="stopping never early"),
        pytest.param({"num_beams": "3", "length_penalty": "-0.5"}, id="a length penalty"),
        pytest.param({"num_beams": "3", "n": "2"}, id="two of three beams"),
        pytest.param({"preset": "caption"}, id="a preset"),
    ],
)
async def test_an_upload_may_say_what_json_may_say(
    client: httpx.AsyncClient, field: dict[str, str]
) -> None:
    files = [("image", ("1.png", b"one"))]
    response = await client.post("/v1/caption", files=files, data=field)

    assert response.status_code == 200, response.text


@pytest.mark.parametrize(
    ("files", "fields", "param"),
    [
        pytest.param([], {"prompt": "a"}, "image", id="no file"),
        pytest.param([("image", ("1.png", b""))], {}, "image", id="an empty file"),
        pytest.param([("photo", ("1.png", b"one"))], {}, "photo", id="a file by another name"),
        pytest.param([("image", ("1.png", b"one"))], {"beams": "1"}, "beams", id="unknown field"),
        pytest.param([("image", ("1.png", b"one"))], {"n": "2"}, "n", id="two greedy answers"),
        pytest.param(
            [("image", ("1.png", b"one"))],
            {"num_beams": "2", "early_stopping": "maybe"},
            "early_stopping",
            id="no such early stopping",
        ),
        pytest.param(
            [("image", ("1.png", b"one"))], {"max_tokens": "many"}, "max_tokens", id="no number"
        ),
    ],
)
async def test_a_wrong_upload_is_an_error_that_names_the_field(
    client: httpx.AsyncClient,
    files: list[tuple[str, tuple[str, bytes]]],
    fields: dict[str, str],
    param: str,
) -> None:
    parts: list[tuple[str, Any]] = [*files, *((k, (None, v)) for k, v in fields.items())]
    response = await client.post("/v1/caption", files=parts)

    assert response.status_code == 400
    assert error_of(response)["param"] == param


async def test_a_media_type_in_capitals_is_what_it_says(client: httpx.AsyncClient) -> None:
    request = client.build_request("POST", "/v1/caption", files={"image": b"one"})
    media_type, boundary = request.headers["content-type"].split(";")
    request.headers["content-type"] = f"{media_type.title()};{boundary}"
    response = await client.send(request)

    assert request.headers["content-type"].startswith("Multipart/Form-Data")
    assert response.status_code == 200
    assert response.json()["data"][0]["caption"].startswith("one:")


@pytest.mark.parametrize("content_type", ["multipart/form-data", "multipart/form-data; boundary=x"])
async def test_a_broken_upload_is_the_clients_error(
    client: httpx.AsyncClient, content_type: str
) -> None:
    response = await client.post(
        "/v1/caption", content=b"garbage", headers={"content-type": content_type}
    )

    assert response.status_code == 400
    assert error_of(response)["type"] == "invalid_request_error"


# -- bad input -------------------------------------------------------------------------------------


@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize(
    "body",
    [
        pytest.param(b"", id="nothing"),
        pytest.param(b"hello", id="no JSON"),
        pytest.param(b'{"image": ', id="half a JSON object"),
        pytest.param(b"\xff\xfe{}", id="no UTF-8"),
        pytest.param(b"[]", id="a JSON array"),
        pytest.param(b"null", id="a JSON null"),
        pytest.param(b"[" * 100_000, id="brackets without end"),
    ],
)
async def test_a_body_that_is_no_json_object_is_the_clients_error(
    client: httpx.AsyncClient, route: str, body: bytes
) -> None:
    response = await post(client, route, body)

    assert response.status_code == 400
    assert error_of(response)["type"] == "invalid_request_error"


@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize(
    ("more", "param"),
    [
        pytest.param({"max_tokens": 0}, "max_tokens", id="no tokens at all"),
        pytest.param({"max_tokens": -1}, "max_tokens", id="less than no tokens"),
        pytest.param({"max_tokens": 2.5}, "max_tokens", id="half a token"),
        pytest.param({"min_tokens": 6, "max_tokens": 5}, "min_tokens", id="least above most"),
        pytest.param({"temperature": float("nan")}, "temperature", id="temperature NaN"),
        pytest.param({"temperature": float("inf")}, "temperature", id="endless temperature"),
        pytest.param({"temperature": -0.5}, "temperature", id="negative temperature"),
        pytest.param({"temperature": 3}, "temperature", id="temperature above two"),
        pytest.param({"temperature": 1, "top_p": 0}, "top_p", id="top_p of zero"),
        pytest.param({"top_p": 0.5}, "top_p", id="top_p without temperature"),
        pytest.param({"top_k": 5}, "top_k", id="top_k without temperature"),
        pytest.param({"n": 2}, "n", id="two greedy answers"),
        pytest.param({"n": 3, "num_beams": 2}, "n", id="more answers than beams"),
        pytest.param({"n": 17, "temperature": 1}, "n", id="too many answers"),
        pytest.param({"num_beams": 9}, "num_beams", id="too many beams"),
        pytest.param({"num_beams": 2, "temperature": 1}, "temperature", id="sampled beams"),
        pytest.param({"length_penalty": 2}, "length_penalty", id="a length penalty of one beam"),
        pytest.param({"early_stopping": True}, "early_stopping", id="early stopping of one beam"),
        pytest.param(
            {"num_beams": 2, "early_stopping": "maybe"}, "early_stopping", id="maybe stopping early"
        ),
        pytest.param({"preset": "haiku"}, "preset", id="an unknown preset"),
        pytest.param({"repetition_penalty": 0}, "repetition_penalty", id="no repetition at all"),
        pytest.param({"stop": ""}, "stop", id="an empty stop string"),
        pytest.param({"stop": ["\n"] * 17}, "stop", id="too many stop strings"),
        pytest.param({"stop": 5}, "stop", id="a number as a stop string"),
        pytest.param({"temprature": 1}, "temprature", id="a misspelt parameter"),
    ],
)
async def test_a_wrong_parameter_is_an_error_that_names_it(
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
async def test_a_message_names_the_field_as_the_client_wrote_it(
    client: httpx.AsyncClient, route: str
) -> None:
    one = error_of(await post(client, route, body_for(route, stop=5)))
    several = error_of(await post(client, route, body_for(route, stop=["a", ""])))

    assert one["message"].startswith("stop: ")
    assert several["message"].startswith("stop[1]: ")


@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize(
    "url",
    [
        pytest.param("data:image/png;base64,@@@@", id="wrong base64"),
        pytest.param("data:image/png;base64,aGk", id="base64 that is cut off"),
        pytest.param("data:image/png,aGk=", id="a data URL without base64"),
        pytest.param("data:image/png;base64", id="a data URL without data"),
        pytest.param("data:image/png;base64,", id="an empty image"),
        pytest.param("aGk=", id="base64 without a data URL"),
        pytest.param("", id="an empty URL"),
        pytest.param("http://example.com/a.png", id="an http URL"),
        pytest.param("file:///etc/passwd", id="a file"),
    ],
)
async def test_a_wrong_image_url_is_an_error_that_names_the_field(
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
async def test_an_image_address_is_refused_with_the_flag_that_would_allow_it(
    client: httpx.AsyncClient, route: str
) -> None:
    text = json.dumps(body_for(route)).replace(data_url(b"picture"), "https://example.com/a.png")
    response = await post(client, route, text.encode())

    assert response.status_code == 400
    assert "--allow-image-urls" in error_of(response)["message"]


async def test_a_chat_with_several_addresses_downloads_none_of_them(
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
        messages = [{"role": "user", "content": [part, part]}]  # a client's later turns repeat it
        response = await client.post("/v1/chat/completions", json={"messages": messages})
        assert response.status_code == 200
    assert downloaded == ["https://example.com/0.png"]


async def test_one_failure_that_is_shared_names_each_requests_own_field(
    client: httpx.AsyncClient, backend: FakeBackend
) -> None:
    backend.failures[b"picture"] = InvalidImage("not an image")  # one object, as from one encode
    backend.together = asyncio.Barrier(len(ROUTES))
    async with asyncio.timeout(10), asyncio.TaskGroup() as group:
        asked = [group.create_task(post(client, route, body_for(route))) for route in ROUTES]

    fields = [error_of(task.result())["param"] for task in asked]
    assert fields == ["messages" if "chat" in route else "image" for route in ROUTES]


async def test_an_unexpected_failure_of_one_caption_ends_the_work_for_the_others(
    client: httpx.AsyncClient, backend: FakeBackend
) -> None:
    backend.failures[b"two"] = KeyError("unexpected")
    backend.held[b"one"] = asyncio.Event()  # never set
    body = {"images": [data_url(b"one"), data_url(b"two")]}
    async with asyncio.timeout(10):
        response = await post(client, "/v1/caption", body)

    assert response.status_code == 500
    assert backend.abandoned == [b"one"]


@pytest.mark.parametrize("route", ROUTES)
async def test_an_image_that_a_stage_refuses_is_an_error_of_the_field_it_came_in(
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
            ContextLengthExceeded("too long", "prompt"), {}, "messages", id="the prompt is too long"
        ),
        pytest.param(
            ContextLengthExceeded("too long", "max_tokens"),
            {"max_completion_tokens": 9},
            "max_completion_tokens",
            id="too many tokens are asked for",
        ),
    ],
)
async def test_a_chat_that_is_too_long_names_a_field_of_the_chat(
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
        pytest.param({"messages": "hello"}, "messages", id="a string for messages"),
        pytest.param({"messages": ["hello"]}, "messages", id="a string for a message"),
        pytest.param({"messages": [user()]}, "messages", id="no image"),
        pytest.param({"messages": [user(b"one", b"two")]}, "messages", id="two different images"),
        pytest.param(
            {"messages": [{"role": "tool", "content": "x"}]}, "messages", id="an unknown role"
        ),
        pytest.param({"messages": [{"content": "x"}]}, "messages", id="a message without a role"),
        pytest.param(
            {"messages": [{"role": "user", "content": []}]}, "messages", id="an empty content"
        ),
        pytest.param(
            {"messages": [user(b"picture"), ASSISTANT]}, "messages", id="the assistant speaks last"
        ),
        pytest.param(
            {"messages": [ASSISTANT, user(b"picture")]}, "messages", id="the assistant begins"
        ),
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
            {"messages": [{"role": "user", "content": [{"type": "audio"}]}]},
            "messages",
            id="an unknown kind of content",
        ),
        pytest.param(
            chat(max_tokens=5, max_completion_tokens=6),
            "max_completion_tokens",
            id="two different limits",
        ),
        pytest.param(chat(logprobs=7), "logprobs", id="a number of log-probabilities"),
        pytest.param(
            chat(top_logprobs=3), "top_logprobs", id="the likeliest tokens without the token"
        ),
        pytest.param(
            chat(logprobs=True, top_logprobs=21), "top_logprobs", id="too many likeliest tokens"
        ),
        pytest.param(chat(tools=[{"type": "function"}]), "tools", id="a tool"),
        pytest.param(chat(presence_penalty=0.5), "presence_penalty", id="a presence penalty"),
        pytest.param(
            chat(response_format={"type": "json_object"}), "response_format", id="JSON as answer"
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
async def test_a_wrong_chat_is_an_error_that_names_the_field(
    client: httpx.AsyncClient, backend: FakeBackend, body: dict[str, Any], param: str
) -> None:
    response = await post(client, "/v1/chat/completions", body)

    error = error_of(response)
    assert response.status_code == 400
    assert error["type"] == "invalid_request_error"
    assert error["param"] == param
    assert backend.prompts == []


async def test_an_unknown_field_deep_in_a_chat_is_named_with_its_place(
    client: httpx.AsyncClient,
) -> None:
    body = {"messages": [{"role": "user", "content": [image_part(alt="a circle")]}]}
    response = await post(client, "/v1/chat/completions", body)

    assert "messages[0].content[0].image_url.alt" in error_of(response)["message"]


@pytest.mark.parametrize(
    ("body", "param"),
    [
        pytest.param({}, "image", id="no image"),
        pytest.param({"images": []}, "images", id="an empty list of images"),
        pytest.param({"images": ["x"] * 65}, "images", id="too many images"),
        pytest.param({"image": "x", "images": ["x"]}, "image", id="image and images"),
        pytest.param({"image": "x", "stream": True}, "stream", id="a stream, which captions lack"),
        pytest.param(
            {"image": "x", "logprobs": 1}, "logprobs", id="log-probabilities, which they lack too"
        ),
    ],
)
async def test_a_wrong_caption_request_is_an_error_that_names_the_field(
    client: httpx.AsyncClient, body: dict[str, Any], param: str
) -> None:
    response = await post(client, "/v1/caption", body)

    assert response.status_code == 400
    assert error_of(response)["param"] == param


@pytest.mark.parametrize("route", ROUTES)
async def test_an_unknown_field_with_half_a_character_in_its_name_is_the_clients_error(
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
async def test_half_a_character_which_no_tokenizer_takes_is_the_clients_error(
    client: httpx.AsyncClient, backend: FakeBackend, route: str, body: dict[str, Any]
) -> None:
    response = await post(client, route, body)

    assert response.status_code == 400
    assert error_of(response)["type"] == "invalid_request_error"
    assert backend.prompts == []


# -- limits ----------------------------------------------------------------------------------------


@pytest.fixture
async def small_client(backend: FakeBackend) -> AsyncIterator[httpx.AsyncClient]:
    """Takes bodies of 1,000 bytes and images of 20."""
    limits = {"max_body_bytes": 1000, "images": {"max_bytes": 20}}
    async with client_of(backend, AppConfig.model_validate({"ingress": limits})) as client:
        yield client


@pytest.mark.parametrize("route", ROUTES)
async def test_a_body_that_declares_too_many_bytes_is_refused(
    small_client: httpx.AsyncClient, route: str
) -> None:
    response = await post(small_client, route, body_for(route, user="x" * 1000))

    assert response.status_code == 413
    assert error_of(response)["code"] == "request_too_large"
    assert "1,000" in error_of(response)["message"]


@pytest.mark.parametrize("route", ROUTES)
async def test_a_body_that_grows_too_large_without_declaring_it_is_refused(
    small_client: httpx.AsyncClient, route: str
) -> None:
    async def pieces() -> AsyncIterator[bytes]:
        for _ in range(30):
            yield b" " * 100

    response = await small_client.post(route, content=pieces())

    assert "content-length" not in response.request.headers
    assert response.status_code == 413
    assert error_of(response)["code"] == "request_too_large"


async def test_an_upload_that_is_too_large_is_refused(small_client: httpx.AsyncClient) -> None:
    files = [("image", ("1.png", b"x" * 1000))]
    response = await small_client.post("/v1/caption", files=files)

    assert response.status_code == 413
    assert error_of(response)["code"] == "request_too_large"


async def test_a_body_within_the_limit_is_taken(small_client: httpx.AsyncClient) -> None:
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
async def test_an_image_above_the_limit_is_refused(
    small_client: httpx.AsyncClient, send: Callable[[httpx.AsyncClient], Any]
) -> None:
    response = await send(small_client)

    assert response.status_code == 400
    assert error_of(response)["param"] == "image"
    assert "20" in error_of(response)["message"]


# -- the other routes ------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["demo", "Salesforce/blip2-opt-2.7b-coco", "a model with spaces"])
async def test_the_served_model_is_listed_and_found_by_its_name(name: str) -> None:
    async with client_of(FakeBackend(), AppConfig(served_model_name=name)) as client:
        listed = (await client.get("/v1/models")).json()
        found = await client.get(f"/v1/models/{name}")
        answered = await post(client, "/v1/chat/completions", chat(model=name))

    assert listed["object"] == "list"
    assert [model["id"] for model in listed["data"]] == [name]
    assert listed["data"][0]["object"] == "model"
    assert found.json() == listed["data"][0]
    assert answered.json()["model"] == name


@pytest.mark.parametrize("route", ROUTES)
async def test_a_request_to_another_model_is_not_found(
    client: httpx.AsyncClient, route: str
) -> None:
    response = await post(client, route, body_for(route, model="gpt-4o"))

    assert response.status_code == 404
    assert error_of(response)["code"] == "model_not_found"
    assert error_of(response)["param"] == "model"
    assert "demo" in error_of(response)["message"]


@pytest.mark.parametrize("name", ["gpt-4o", "a/b"])
async def test_a_model_that_is_not_served_is_not_found(
    client: httpx.AsyncClient, name: str
) -> None:
    response = await client.get(f"/v1/models/{name}")

    assert response.status_code == 404
    assert error_of(response)["code"] == "model_not_found"


async def test_health_answers_while_the_stages_still_load(
    client: httpx.AsyncClient, backend: FakeBackend
) -> None:
    backend.is_ready = False

    assert (await client.get("/health")).status_code == 200


async def test_ready_answers_200_once_the_backend_is_ready(
    client: httpx.AsyncClient, backend: FakeBackend
) -> None:
    backend.is_ready = False
    before = await client.get("/ready")
    backend.is_ready = True
    after = await client.get("/ready")

    assert before.status_code == 503
    assert error_of(before)["code"] == "unavailable"
    assert after.status_code == 200


async def test_an_unknown_route_is_a_404_in_openais_shape(client: httpx.AsyncClient) -> None:
    response = await client.get("/v1/embeddings")

    assert response.status_code == 404
    assert error_of(response)["type"] == "invalid_request_error"


async def test_a_wrong_method_is_a_405_that_says_which_is_right(client: httpx.AsyncClient) -> None:
    response = await client.get("/v1/chat/completions")

    assert response.status_code == 405
    assert error_of(response)["type"] == "invalid_request_error"
    assert response.headers["allow"] == "POST"


async def test_an_unforeseen_failure_is_a_500_that_tells_nothing_of_the_inside(
    client: httpx.AsyncClient, backend: FakeBackend
) -> None:
    backend.generation_failure = KeyError("secret")
    response = await post(client, "/v1/chat/completions", chat())

    assert response.status_code == 500
    assert error_of(response)["type"] == "server_error"
    assert "secret" not in response.text


async def test_the_openapi_description_shows_every_route(client: httpx.AsyncClient) -> None:
    described = (await client.get("/openapi.json")).json()

    assert {*ROUTES, "/v1/models", "/health", "/ready"} <= described["paths"].keys()
    caption = described["paths"]["/v1/caption"]["post"]["requestBody"]["content"]
    assert caption.keys() == {"application/json", "multipart/form-data"}
