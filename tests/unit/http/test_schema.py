"""Request bodies to sampling parameters."""

from __future__ import annotations

from typing import Any

import pytest
from pydantic import ValidationError

from blip2_serve.errors import InvalidRequest
from blip2_serve.http.schema import (
    CaptionFields,
    CaptionRequest,
    ChatRequest,
    GenerateRequest,
    GenerationFields,
)
from blip2_serve.types import SamplingParams

MESSAGES = [{"role": "user", "content": "what is it?"}]


def params(**fields: Any) -> SamplingParams:
    return GenerationFields.model_validate({"seed": 0, **fields}).sampling_params()


def chat(**fields: Any) -> ChatRequest:
    return ChatRequest.model_validate({"messages": MESSAGES, **fields})


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        pytest.param({}, SamplingParams(), id="nothing asked is greedy"),
        pytest.param({"max_tokens": 3}, SamplingParams(max_tokens=3), id="a limit"),
        pytest.param({"stop": "\n"}, SamplingParams(stop=("\n",)), id="one stop string"),
        pytest.param({"stop": ["a", "b"]}, SamplingParams(stop=("a", "b")), id="stop strings"),
        pytest.param({"stop": []}, SamplingParams(), id="an empty list of stop strings"),
        pytest.param({"top_k": -1}, SamplingParams(top_k=0), id="minus one keeps every token"),
        pytest.param({"top_k": 1}, SamplingParams(top_k=1), id="one token is greedy anyway"),
        pytest.param(
            {"temperature": 1, "top_k": 5, "top_p": 0.5},
            SamplingParams(temperature=1.0, top_k=5, top_p=0.5),
            id="sampling",
        ),
        pytest.param(
            {"min_tokens": 5, "max_tokens": 5},
            SamplingParams(min_tokens=5, max_tokens=5),
            id="an exact length",
        ),
        pytest.param(
            {"repetition_penalty": 1.5, "ignore_eos": True},
            SamplingParams(repetition_penalty=1.5, ignore_eos=True),
            id="what OpenAI has no name for",
        ),
        pytest.param({"seed": -(1 << 63)}, SamplingParams(seed=-(1 << 63)), id="lowest seed"),
        pytest.param(
            {"max_tokens": "3", "temperature": "0.5", "ignore_eos": "true", "n": "1"},
            SamplingParams(max_tokens=3, temperature=0.5, ignore_eos=True),
            id="strings, as multipart has them",
        ),
    ],
)
def test_fields_become_parameters(fields: dict[str, Any], expected: SamplingParams) -> None:
    assert params(**fields) == expected


def test_a_seed_is_drawn_where_none_is_given() -> None:
    seeds = {GenerationFields().sampling_params().seed for _ in range(4)}

    assert len(seeds) == 4


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        pytest.param({"top_p": 0.9}, "top_p", id="top_p of a greedy answer"),
        pytest.param({"top_k": 2, "temperature": 0}, "top_k", id="top_k of a greedy answer"),
        pytest.param({"min_tokens": 3, "max_tokens": 2}, "min_tokens", id="least above most"),
    ],
)
def test_parameters_that_contradict_each_other_are_refused(
    fields: dict[str, Any], param: str
) -> None:
    with pytest.raises(InvalidRequest) as caught:
        params(**fields)

    assert caught.value.param == param


@pytest.mark.parametrize(
    "fields",
    [
        pytest.param({"seed": 1 << 63}, id="a seed above 64 bits"),
        pytest.param({"top_k": -2}, id="top_k below minus one"),
        pytest.param({"top_p": 1.1}, id="top_p above one"),
        pytest.param({"stop": ["x"] * 17}, id="seventeen stop strings"),
        pytest.param({"stop": "x" * 257}, id="a very long stop string"),
        pytest.param({"repetition_penalty": 11}, id="a huge repetition penalty"),
        pytest.param({"early_stopping": True}, id="early stopping"),
        pytest.param({"length_penalty": 2}, id="a length penalty"),
    ],
)
def test_values_out_of_range_are_refused(fields: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        params(**fields)


@pytest.mark.parametrize("name", ["max_tokens", "max_completion_tokens"])
def test_a_chat_takes_its_limit_by_either_name(name: str) -> None:
    assert chat(**{name: 5}).sampling_params().max_tokens == 5
    with pytest.raises(InvalidRequest, match=rf"min_tokens is above {name}$"):
        chat(**{name: 5}, min_tokens=6).sampling_params()


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        pytest.param({}, False, id="no stream"),
        pytest.param({"stream": True}, False, id="no options"),
        pytest.param({"stream": True, "stream_options": {}}, False, id="empty options"),
        pytest.param(
            {"stream": True, "stream_options": {"include_usage": True}}, True, id="asked for"
        ),
        pytest.param({"stream": False, "stream_options": None}, False, id="null options"),
    ],
)
def test_usage_is_included_when_asked_for(fields: dict[str, Any], expected: bool) -> None:
    assert GenerateRequest.model_validate({"image": "x", **fields}).include_usage is expected


def test_a_caption_request_has_one_image_or_several() -> None:
    assert CaptionRequest(image="a").urls == ["a"]
    assert CaptionRequest(images=["a", "b"]).urls == ["a", "b"]


def test_uploads_take_every_parameter_of_captions_but_the_images() -> None:
    assert CaptionRequest.model_fields.keys() - CaptionFields.model_fields.keys() == {
        "image",
        "images",
    }
