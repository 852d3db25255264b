"""Errors of pydantic in words that help the client."""

from __future__ import annotations

import json
from typing import Any

import pytest
from pydantic import BaseModel, ValidationError

from blip2_serve.errors import InvalidRequest
from blip2_serve.http.schema import CaptionRequest, ChatRequest
from blip2_serve.http.validation import explain


def explained(schema: type[BaseModel], body: Any) -> InvalidRequest:
    with pytest.raises(ValidationError) as caught:
        schema.model_validate(body)
    return explain(caught.value.errors(), body)


def part(**fields: Any) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": [fields]}]}


@pytest.mark.parametrize(
    ("body", "message", "param"),
    [
        pytest.param({}, "messages is required", "messages", id="a missing field"),
        pytest.param(
            {"messages": [{"role": "user", "content": "x"}], "beam": 1},
            "unknown parameter beam",
            "beam",
            id="an unknown field",
        ),
        pytest.param(
            {"messages": [{"role": "user", "content": "x", "mood": 1}]},
            "unknown parameter messages[0].mood",
            "messages",
            id="an unknown field of a message",
        ),
        pytest.param(
            part(type="image_url", image_url={}),
            "messages[0].content[0].image_url.url is required",
            "messages",
            id="a missing nested field",
        ),
        pytest.param(
            part(type="text", text="x", size=1),
            "unknown parameter messages[0].content[0].size",
            "messages",
            id="an unknown field of a content part",
        ),
        pytest.param(
            {"messages": [{"role": "user", "user": {"a": 1}, "content": "x"}]},
            "unknown parameter messages[0].user",
            "messages",
            id="an unknown field named like the role",
        ),
        pytest.param(
            {"messages": []},
            "messages: list should have at least 1 item, not 0",
            "messages",
            id="an empty list",
        ),
        pytest.param(
            part(type="text"),
            "messages[0].content[0].text is required",
            "messages",
            id="a text part without text",
        ),
    ],
)
def test_the_message_names_the_path_of_the_field(body: Any, message: str, param: str) -> None:
    error = explained(ChatRequest, body)

    assert error.message == message
    assert error.param == param


@pytest.mark.parametrize(
    ("body", "place"),
    [
        pytest.param({"temperature": "hot"}, "temperature: ", id="a field"),
        pytest.param({"stop": ["a", 5]}, "stop[1]: ", id="an item of a list"),
        pytest.param(
            {"messages": [{"role": "nobody"}]}, "messages[0]: ", id="a message with an unknown role"
        ),
        pytest.param(
            part(type="image_url", image_url={"url": 5}),
            "messages[0].content[0].image_url.url: ",
            id="a nested value",
        ),
    ],
)
def test_the_message_about_a_value_starts_with_its_path(body: dict[str, Any], place: str) -> None:
    good = {"messages": [{"role": "user", "content": "x"}]}

    assert explained(ChatRequest, {**good, **body}).message.startswith(place)


def test_of_several_errors_the_deepest_is_reported() -> None:
    body = {"temperature": "hot", **part(type="text", text=5)}

    assert explained(ChatRequest, body).message.startswith("messages[0].content[0].text: ")


def test_messages_of_validators_lose_pydantics_prefix() -> None:
    error = explained(CaptionRequest, {"image": "x", "stop": ["x"] * 17})

    assert error.message == "stop: at most 16 stop strings are allowed"


@pytest.mark.parametrize("body", [None, [], "text", 5], ids=str)
def test_a_body_that_is_no_object_is_named_as_the_reason(body: Any) -> None:
    assert explained(CaptionRequest, body).message == "the body must be a JSON object"


def test_a_body_that_is_not_json_is_named_as_the_reason() -> None:
    with pytest.raises(ValidationError) as caught:
        CaptionRequest.model_validate_json("{")
    error = explain(caught.value.errors(), None)

    assert error.message.startswith("the body is not valid JSON: ")
    assert error.param is None


def test_an_empty_list_of_errors_is_still_an_error() -> None:
    assert explain([], None).status == 400


def test_the_message_never_repeats_values_of_the_body() -> None:
    secret = "do not log me"
    error = explained(CaptionRequest, {"image": "x", "max_tokens": [secret]})

    assert secret not in json.dumps(error.body())
