"""Every parameter of OpenAI's chat completions and completions: accepted, or refused with why."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any

import httpx
import pytest
from fastapi import FastAPI
from openai.types import completion_create_params as completions
from openai.types.chat import completion_create_params as chats

from blip2_serve.config import AppConfig
from blip2_serve.http.api import create_app
from blip2_serve.http.schema import CaptionFields, ChatRequest, GenerateRequest
from support.fake_backend import ROUTES, FakeBackend, body_for, client_of_app, error_of, post
from support.recorder import FakeRecorder

CHAT = {*chats.CompletionCreateParamsBase.__annotations__, "stream"}
COMPLETIONS = {*completions.CompletionCreateParamsBase.__annotations__, "stream"}
REQUIRED = {"messages", "prompt"}

FUNCTION = {"name": "look", "parameters": {"type": "object", "properties": {}}}
SCHEMA = {"name": "shapes", "schema": {"type": "object"}}

# Values that OpenAI accepts and that cannot change a text answer.
WITHOUT_EFFECT: dict[str, list[Any]] = {
    "user": ["someone", ""],
    "safety_identifier": ["a1b2"],
    "metadata": [{}, {"run": "7"}],
    "store": [True, False],
    "service_tier": ["auto", "default", "flex", "scale", "priority", "fast"],
    "prompt_cache_key": ["captions"],
    "prompt_cache_retention": ["in_memory", "24h"],
    "prompt_cache_options": [{}, {"mode": "explicit", "ttl": "30m"}],
    "reasoning_effort": ["none", "minimal", "low", "medium", "high", "xhigh", "max"],
    "verbosity": ["low", "medium", "high"],
    "prediction": [
        {"type": "content", "content": "a red square"},
        {"type": "content", "content": [{"type": "text", "text": "a red square"}]},
    ],
    "parallel_tool_calls": [True, False],
    "tools": [[]],
    "tool_choice": ["none", "auto"],
    "functions": [[]],
    "function_call": ["none", "auto"],
    "response_format": [{"type": "text"}],
    "modalities": [["text"]],
    "audio": [],
    "web_search_options": [],
    "moderation": [],
    "echo": [False],
    "suffix": [""],
    "best_of": [1],
    "stream": [False],
    "stream_options": [],
    "logprobs": [False],
    "top_logprobs": [0],
    "stop": ["", [], [""]],
    "n": [1],
    "frequency_penalty": [0, 0.0],
    "presence_penalty": [0, 0.0],
    "logit_bias": [{}],
    "temperature": [0],
    "top_p": [1, 1.0, 0],
    "seed": [7],
}

# Values that OpenAI accepts and that would change the answer in a way that this model cannot.
REFUSED: dict[str, list[Any]] = {
    "tools": [[{"type": "function", "function": FUNCTION}], [{"type": "custom"}]],
    "tool_choice": ["required", {"type": "function", "function": {"name": "look"}}],
    "functions": [[FUNCTION]],
    "function_call": [{"name": "look"}],
    "response_format": [
        {"type": "json_object"},
        {"type": "json_schema", "json_schema": SCHEMA},
    ],
    "modalities": [["text", "audio"], ["audio"]],
    "audio": [{"voice": "alloy", "format": "wav"}],
    "web_search_options": [{}, {"search_context_size": "low"}],
    "moderation": [{"model": "omni-moderation-latest"}],
    "echo": [True],
    "suffix": [" on white"],
    "best_of": [3],
}

WRONG: dict[str, list[Any]] = {
    "user": [5, ["someone"]],
    "metadata": ["run", {"run": {"number": 7}}],
    "store": ["perhaps"],
    "service_tier": [1, "x" * 65],
    "prompt_cache_options": ["24h"],
    "reasoning_effort": [3, {"effort": "low"}],
    "verbosity": [["low"]],
    "prediction": ["a red square"],
    "parallel_tool_calls": ["sometimes"],
    "tools": ["look", {}],
    "tool_choice": [5],
    "functions": [{}],
    "function_call": [[]],
    "response_format": ["text", {}, {"type": "text", "strict": True}],
    "modalities": ["text", [5]],
}


@pytest.fixture(scope="module")
def shared() -> tuple[FakeBackend, FastAPI]:
    """Made once: making the routes takes longer than any test here."""
    backend = FakeBackend()
    return backend, create_app(backend, AppConfig(), FakeRecorder())


@pytest.fixture
def backend(shared: tuple[FakeBackend, FastAPI]) -> FakeBackend:
    backend, _ = shared
    vars(backend).update(vars(FakeBackend()))
    return backend


@pytest.fixture
async def client(shared: tuple[FakeBackend, FastAPI]) -> AsyncIterator[httpx.AsyncClient]:
    _, app = shared
    async with client_of_app(app) as client:
        yield client


def pairs(table: dict[str, list[Any]]) -> list[Any]:
    return [
        pytest.param(name, value, id=f"{name} {value!r}"[:60])
        for name, values in table.items()
        for value in values
    ]


def test_every_parameter_of_openai_is_a_field() -> None:
    assert CHAT - ChatRequest.model_fields.keys() == set()
    assert COMPLETIONS - GenerateRequest.model_fields.keys() == set()
    everything = (CHAT | COMPLETIONS) - REQUIRED
    for fields in (ChatRequest, GenerateRequest, CaptionFields):
        assert everything - fields.model_fields.keys() == set()


def test_the_tables_cover_the_parameters_that_have_no_effect() -> None:
    everything = (CHAT | COMPLETIONS) - REQUIRED
    limits = {"model", "max_tokens", "max_completion_tokens"}
    assert everything - limits == WITHOUT_EFFECT.keys()


@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize("name", sorted((CHAT | COMPLETIONS) - REQUIRED))
async def test_null_means_not_given(
    client: httpx.AsyncClient, backend: FakeBackend, route: str, name: str
) -> None:
    await post(client, route, body_for(route, seed=0))
    response = await post(client, route, body_for(route, **{"seed": 0, name: None}))

    assert response.status_code == 200, response.text
    if name != "seed":
        assert backend.params[1] == backend.params[0]


@pytest.mark.parametrize(
    "name",
    ["include_usage", "include_obfuscation", "include_timing", "include_beams", "include_events"],
)
@pytest.mark.parametrize("value", [None, True, False])
@pytest.mark.parametrize("route", ROUTES[:2])
async def test_options_of_a_stream_may_be_null_too(
    client: httpx.AsyncClient, route: str, name: str, value: bool | None
) -> None:
    body = body_for(route, stream=True, stream_options={name: value})

    assert (await post(client, route, body)).status_code == 200


@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize(("name", "value"), pairs(WITHOUT_EFFECT))
async def test_a_parameter_that_cannot_change_the_answer_is_accepted(
    client: httpx.AsyncClient, backend: FakeBackend, route: str, name: str, value: Any
) -> None:
    await post(client, route, body_for(route, seed=7))
    response = await post(client, route, body_for(route, **{"seed": 7, name: value}))

    assert response.status_code == 200, response.text
    assert backend.params[1] == backend.params[0]


@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize(("name", "value"), pairs(REFUSED))
async def test_a_parameter_that_would_change_the_answer_is_refused_with_the_reason(
    client: httpx.AsyncClient, backend: FakeBackend, route: str, name: str, value: Any
) -> None:
    response = await post(client, route, body_for(route, **{name: value}))

    error = error_of(response)
    assert response.status_code == 400
    assert error["param"] == name
    assert error["message"].startswith(name)
    assert any(word in error["message"] for word in ("leave", "must be equal"))
    assert "Input should" not in error["message"]
    assert backend.prompts == []


@pytest.mark.parametrize(("name", "value"), pairs(WRONG))
async def test_a_value_that_openai_refuses_too_is_a_400(
    client: httpx.AsyncClient, name: str, value: Any
) -> None:
    response = await post(client, ROUTES[0], body_for(ROUTES[0], **{name: value}))

    assert response.status_code == 400
    assert error_of(response)["param"] == name


@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize("value", [None, 1, {}])
@pytest.mark.parametrize("name", ["max_new_token", "reasoning", "Temperature", "extra_body"])
async def test_a_name_that_is_nobodys_is_a_400_even_with_null(
    client: httpx.AsyncClient, route: str, name: str, value: Any
) -> None:
    response = await post(client, route, body_for(route, **{name: value}))

    assert response.status_code == 400
    assert error_of(response)["message"] == f"unknown parameter {name}"


async def test_captions_say_that_they_are_not_streamed(client: httpx.AsyncClient) -> None:
    error = error_of(await post(client, ROUTES[2], body_for(ROUTES[2], stream=True)))

    assert error["param"] == "stream"
    assert "/v1/chat/completions" in error["message"]
