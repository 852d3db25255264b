"""Whole answers, and the routes about the server, over a fake backend."""

from __future__ import annotations

import json
from typing import Any

import httpx
import pytest

from blip2_serve.config import AppConfig
from blip2_serve.errors import Unavailable
from blip2_serve.types import SamplingParams
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
    image_part,
    post,
    user,
)


async def test_a_chat_gets_exactly_openais_chat_completion(
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


async def test_generate_returns_the_raw_text_as_openais_completions_do(
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


async def test_every_answer_has_its_own_id(client: httpx.AsyncClient) -> None:
    answers = [(await post(client, "/v1/chat/completions", chat())).json() for _ in range(2)]

    assert answers[0]["id"] != answers[1]["id"]


@pytest.mark.parametrize("route", ROUTES[:2])
async def test_token_ids_are_returned_on_request(client: httpx.AsyncClient, route: str) -> None:
    answer = (await post(client, route, body_for(route, return_token_ids=True))).json()

    assert answer["choices"][0]["token_ids"] == list(TOKEN_IDS)


@pytest.mark.parametrize("route", ROUTES[:2])
@pytest.mark.parametrize(
    "asked",
    [
        pytest.param({"n": 3, "temperature": 1}, id="samples"),
        pytest.param({"n": 3, "num_beams": 4}, id="best beams"),
    ],
)
async def test_n_answers_are_returned_as_n_choices(
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


async def test_a_chat_gets_log_probabilities_on_request(
    client: httpx.AsyncClient,
) -> None:
    body = chat(logprobs=True, top_logprobs=2)
    answer = (await post(client, "/v1/chat/completions", body)).json()

    content = answer["choices"][0]["logprobs"]["content"]
    assert "".join(token["token"] for token in content) == f" picture:{TEXT}"
    assert {token["logprob"] for token in content} == {-0.5}
    assert [len(token["top_logprobs"]) for token in content] == [2] * len(TOKEN_IDS)


async def test_generate_returns_log_probabilities_on_request(
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
async def test_the_backend_gets_the_parameters_of_a_preset(
    client: httpx.AsyncClient, backend: FakeBackend, route: str
) -> None:
    response = await post(client, route, body_for(route, preset="vqa", max_tokens=4, seed=0))

    assert response.status_code == 200, response.text
    expected = SamplingParams(num_beams=5, max_tokens=4, min_tokens=1, length_penalty=0.0)
    assert backend.params == [expected]


@pytest.mark.parametrize(
    ("preset", "prompt"),
    [
        pytest.param("vqa", "Question: what is it? Short answer:", id="vqa"),
        pytest.param("caption", "Question: what is it? Answer:", id="caption"),
        pytest.param(None, "Question: what is it? Answer:", id="none"),
    ],
)
async def test_only_the_vqa_preset_makes_a_chat_ask_for_a_short_answer(
    client: httpx.AsyncClient, backend: FakeBackend, preset: str | None, prompt: str
) -> None:
    await post(client, "/v1/chat/completions", chat(preset=preset))

    assert backend.prompts == [prompt]


@pytest.mark.parametrize("route", ROUTES)
async def test_the_backend_gets_what_the_client_sent(
    client: httpx.AsyncClient, backend: FakeBackend, route: str
) -> None:
    asked = {"max_tokens": 7, "temperature": 0.5, "top_p": 0.9, "seed": 3, "stop": ["\n", "."]}

    assert (await post(client, route, body_for(route, **asked))).status_code == 200
    assert backend.encoded == [b"picture"]
    assert backend.params == [
        SamplingParams(max_tokens=7, temperature=0.5, top_p=0.9, seed=3, stop=("\n", "."))
    ]


async def test_a_chat_becomes_one_prompt(client: httpx.AsyncClient, backend: FakeBackend) -> None:
    turns = [
        user(b"picture", text="what is it?"),
        {"role": "assistant", "content": "a {circle}."},
        {"role": "user", "content": "what color?"},
    ]
    await post(client, "/v1/chat/completions", {"messages": turns})

    assert backend.prompts == [
        "Question: what is it? Answer: a {circle}. Question: what color? Answer:"
    ]


async def test_a_later_turn_may_repeat_the_image(
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
        pytest.param({"user": "someone"}, id="user"),
        pytest.param({"metadata": {"a": "b"}}, id="metadata"),
        pytest.param({"store": True}, id="store"),
        pytest.param({"frequency_penalty": 0, "presence_penalty": 0.0}, id="zero penalties"),
        pytest.param({"response_format": {"type": "text"}}, id="text response format"),
        pytest.param({"n": 1}, id="one choice"),
        pytest.param({"logprobs": False}, id="logprobs off"),
        pytest.param({"tools": [], "tool_choice": "none"}, id="no tools"),
        pytest.param({"stream": False}, id="stream off"),
        pytest.param({"stop": None, "seed": None, "max_tokens": None}, id="null for the default"),
        pytest.param({"temperature": 0, "top_p": 1}, id="top_p 1"),
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
            id="image detail",
        ),
        pytest.param(
            {"messages": [user(b"picture"), ECHOED, {"role": "user", "content": "what color?"}]},
            id="an answer with all its fields",
        ),
    ],
)
async def test_fields_that_change_nothing_are_accepted(
    client: httpx.AsyncClient, more: dict[str, Any]
) -> None:
    response = await post(client, "/v1/chat/completions", chat(**more))

    assert response.status_code == 200, response.text


async def test_json_is_accepted_even_when_curl_declares_a_form(client: httpx.AsyncClient) -> None:
    for route in ROUTES:
        response = await client.post(
            route,
            content=json.dumps(body_for(route)),
            headers={"content-type": "application/x-www-form-urlencoded"},
        )
        assert response.status_code == 200, response.text


# -- the other routes ------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["demo", "Salesforce/blip2-opt-2.7b-coco", "a model with spaces"])
async def test_the_served_model_is_listed_and_found_by_name(name: str) -> None:
    async with client_of(FakeBackend(), AppConfig(served_model_name=name)) as client:
        listed = (await client.get("/v1/models")).json()
        found = await client.get(f"/v1/models/{name}")
        answered = await post(client, "/v1/chat/completions", chat(model=name))

    assert listed["object"] == "list"
    assert [model["id"] for model in listed["data"]] == [name, f"{name}:caption", f"{name}:vqa"]
    assert listed["data"][0]["object"] == "model"
    assert found.json() == listed["data"][0]
    assert answered.json()["model"] == name


@pytest.mark.parametrize("route", ROUTES)
async def test_a_request_for_another_model_is_a_404(client: httpx.AsyncClient, route: str) -> None:
    response = await post(client, route, body_for(route, model="gpt-4o"))

    assert response.status_code == 404
    assert error_of(response)["code"] == "model_not_found"
    assert error_of(response)["param"] == "model"
    assert "demo" in error_of(response)["message"]


@pytest.mark.parametrize("name", ["gpt-4o", "a/b"])
async def test_looking_up_another_model_is_a_404(client: httpx.AsyncClient, name: str) -> None:
    response = await client.get(f"/v1/models/{name}")

    assert response.status_code == 404
    assert error_of(response)["code"] == "model_not_found"


async def test_health_is_200_while_the_stages_are_loading(
    client: httpx.AsyncClient, backend: FakeBackend
) -> None:
    backend.is_ready = False

    assert (await client.get("/health")).status_code == 200


async def test_ready_is_200_once_the_backend_is_ready(
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


async def test_a_wrong_method_is_a_405_that_names_the_right_one(client: httpx.AsyncClient) -> None:
    response = await client.get("/v1/chat/completions")

    assert response.status_code == 405
    assert error_of(response)["type"] == "invalid_request_error"
    assert response.headers["allow"] == "POST"


async def test_an_unexpected_failure_is_a_500_that_reveals_nothing(
    client: httpx.AsyncClient, backend: FakeBackend
) -> None:
    backend.generation_failure = KeyError("secret")
    response = await post(client, "/v1/chat/completions", chat())

    assert response.status_code == 500
    assert error_of(response)["type"] == "server_error"
    assert "secret" not in response.text


async def test_the_openapi_schema_describes_every_route(client: httpx.AsyncClient) -> None:
    described = (await client.get("/openapi.json")).json()

    assert {*ROUTES, "/v1/models", "/health", "/ready"} <= described["paths"].keys()
    caption = described["paths"]["/v1/caption"]["post"]["requestBody"]["content"]
    assert caption.keys() == {"application/json", "multipart/form-data"}


async def test_the_status_has_every_stage() -> None:
    backend = FakeBackend()
    async with client_of(backend) as client:
        status = (await client.get("/v1/status")).json()
        backend.is_ready = False
        later = (await client.get("/v1/status")).json()
    assert (status["object"], status["ready"], later["ready"]) == ("status", True, False)
    names = ["ingress", "preprocessor", "encoder", "generator"]
    assert [stage["name"] for stage in status["stages"]] == names
    assert status["stages"][1] == {
        "name": "preprocessor",
        "replicas": {"running": 2, "starting": 1, "stopping": 0},
        "waiting": 3,
        "rate_per_s": 12.5,
        "capacity_per_s": 20.5,
    }


async def test_nobody_knows_the_status_without_the_controller(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async def status(_: FakeBackend) -> None:
        raise Unavailable("Ray Serve's controller does not answer")

    monkeypatch.setattr(FakeBackend, "status", status)
    async with client_of(FakeBackend()) as client:
        assert (await client.get("/v1/status")).status_code == 503
