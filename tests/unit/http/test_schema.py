"""Request bodies to sampling parameters."""

from __future__ import annotations

from typing import Any

import pytest
from pydantic import BaseModel, ValidationError

from blip2_serve.errors import InvalidRequest
from blip2_serve.http.schema import (
    CaptionFields,
    CaptionRequest,
    ChatRequest,
    GenerateRequest,
)
from blip2_serve.http.schema_generation import GenerationFields
from blip2_serve.types import SamplingParams

MESSAGES = [{"role": "user", "content": "what is it?"}]


def params(**fields: Any) -> SamplingParams:
    return GenerationFields.model_validate({"seed": 0, **fields}).sampling_params()


def chat(**fields: Any) -> ChatRequest:
    return ChatRequest.model_validate({"messages": MESSAGES, **fields})


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        pytest.param({}, SamplingParams(), id="greedy by default"),
        pytest.param({"max_tokens": 3}, SamplingParams(max_tokens=3), id="a limit"),
        pytest.param({"stop": "\n"}, SamplingParams(stop=("\n",)), id="one stop string"),
        pytest.param({"stop": ["a", "b"]}, SamplingParams(stop=("a", "b")), id="stop strings"),
        pytest.param({"stop": []}, SamplingParams(), id="an empty list of stop strings"),
        pytest.param({"top_k": -1}, SamplingParams(top_k=0), id="top_k -1"),
        pytest.param(
            {"temperature": 1, "top_k": 5, "top_p": 0.5, "min_p": 0.1},
            SamplingParams(temperature=1.0, top_k=5, top_p=0.5, min_p=0.1),
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
            id="transformers' parameters",
        ),
        pytest.param(
            {"temperature": 1, "n": 4}, SamplingParams(temperature=1.0, n=4), id="four samples"
        ),
        pytest.param(
            {"num_beams": 4, "n": 4, "length_penalty": -0.5, "early_stopping": "never"},
            SamplingParams(num_beams=4, n=4, length_penalty=-0.5, early_stopping="never"),
            id="all of four beams",
        ),
        pytest.param(
            {"num_beams": 2, "early_stopping": True, "length_penalty": 0},
            SamplingParams(num_beams=2, early_stopping=True, length_penalty=0.0),
            id="beams with length penalty 0",
        ),
        pytest.param(
            {"num_beams": 1, "length_penalty": 1, "early_stopping": False, "n": 1},
            SamplingParams(),
            id="one beam is greedy",
        ),
        pytest.param({"seed": -(1 << 63)}, SamplingParams(seed=-(1 << 63)), id="lowest seed"),
        pytest.param(
            {"max_tokens": "3", "temperature": "0.5", "ignore_eos": "true", "n": "1"},
            SamplingParams(max_tokens=3, temperature=0.5, ignore_eos=True),
            id="strings, as in multipart bodies",
        ),
        pytest.param(
            {"num_beams": "3", "n": "2", "length_penalty": "0.5", "early_stopping": "true"},
            SamplingParams(num_beams=3, n=2, length_penalty=0.5, early_stopping=True),
            id="strings for beams",
        ),
        pytest.param(
            {"num_beams": "3", "early_stopping": "never"},
            SamplingParams(num_beams=3, early_stopping="never"),
            id="never is not a boolean",
        ),
    ],
)
def test_fields_become_parameters(fields: dict[str, Any], expected: SamplingParams) -> None:
    assert params(**fields) == expected


def test_a_missing_seed_is_drawn() -> None:
    seeds = {GenerationFields().sampling_params().seed for _ in range(4)}

    assert len(seeds) == 4


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        pytest.param({"min_p": 0.1}, "min_p", id="min_p without temperature"),
        pytest.param({"min_tokens": 3, "max_tokens": 2}, "min_tokens", id="min above max"),
        pytest.param({"num_beams": 2, "temperature": 0.1}, "temperature", id="sampled beams"),
        pytest.param({"num_beams": 2, "n": 3}, "n", id="more answers than beams"),
        pytest.param({"best_of": 2}, "best_of", id="more answers than are returned"),
        pytest.param({"length_penalty": 2}, "length_penalty", id="length penalty without beams"),
        pytest.param({"length_penalty": 0}, "length_penalty", id="length penalty 0 without beams"),
        pytest.param({"early_stopping": True}, "early_stopping", id="early stopping without beams"),
        pytest.param({"early_stopping": "never"}, "early_stopping", id="never without beams"),
        pytest.param(
            {"n": 2, "temperature": 1, "early_stopping": True},
            "early_stopping",
            id="early stopping with samples",
        ),
        pytest.param(
            {"preset": "caption", "temperature": 1},
            "temperature",
            id="sampled preset",
        ),
        pytest.param({"preset": "vqa", "n": 6}, "n", id="more answers than a preset has beams"),
        pytest.param(
            {"preset": "caption", "num_beams": 1, "length_penalty": 2},
            "length_penalty",
            id="length penalty with a preset but one beam",
        ),
        pytest.param(
            {"preset": "caption", "min_tokens": 31},
            "min_tokens",
            id="min above a preset's max",
        ),
    ],
)
def test_contradicting_parameters_are_refused(fields: dict[str, Any], param: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        params(**fields)

    assert caught.value.param == param


@pytest.mark.parametrize(
    "fields",
    [
        pytest.param({"seed": 1 << 63}, id="a seed beyond 64 bits"),
        pytest.param({"top_k": -2}, id="top_k below -1"),
        pytest.param({"top_p": 1.1}, id="top_p above 1"),
        pytest.param({"top_p": -0.1}, id="top_p below 0"),
        pytest.param({"frequency_penalty": 2.1}, id="frequency penalty above 2"),
        pytest.param({"presence_penalty": -2.1}, id="presence penalty below -2"),
        pytest.param({"logit_bias": {"5": 101}}, id="a bias above 100"),
        pytest.param({"logit_bias": {"5": -101}}, id="a bias below -100"),
        pytest.param({"logit_bias": {"-5": 1}}, id="a bias of a negative token id"),
        pytest.param({"logit_bias": {"the": 1}}, id="a bias of a word"),
        pytest.param({"logit_bias": {"5": float("nan")}}, id="a NaN bias"),
        pytest.param({"logit_bias": [5]}, id="a list of biases"),
        pytest.param({"logit_bias": {str(i): 1 for i in range(1025)}}, id="too many biases"),
        pytest.param({"min_p": 1.1}, id="min_p above 1"),
        pytest.param({"min_p": -0.1}, id="min_p below 0"),
        pytest.param({"stop": ["x"] * 17}, id="seventeen stop strings"),
        pytest.param({"stop": "x" * 257}, id="a stop string that is too long"),
        pytest.param({"repetition_penalty": 11}, id="repetition penalty too high"),
        pytest.param({"num_beams": 9}, id="nine beams"),
        pytest.param({"num_beams": 0}, id="no beams"),
        pytest.param({"n": 17, "temperature": 1}, id="seventeen answers"),
        pytest.param({"n": 0}, id="no answers"),
        pytest.param({"num_beams": 2, "length_penalty": 11}, id="length penalty too high"),
        pytest.param({"num_beams": 2, "length_penalty": float("nan")}, id="NaN length penalty"),
        pytest.param({"num_beams": 2, "early_stopping": "maybe"}, id="unknown early stopping"),
        pytest.param({"preset": "haiku"}, id="an unknown preset"),
    ],
)
def test_values_out_of_range_are_refused(fields: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        params(**fields)


# -- presets ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        pytest.param(
            {"preset": "caption"},
            SamplingParams(num_beams=5, max_tokens=30, min_tokens=8),
            id="caption",
        ),
        pytest.param(
            {"preset": "vqa"},
            SamplingParams(num_beams=5, max_tokens=10, min_tokens=1, length_penalty=0.0),
            id="vqa",
        ),
        pytest.param(
            {"preset": "vqa", "length_penalty": -1, "num_beams": 3, "n": 2, "max_tokens": 4},
            SamplingParams(num_beams=3, max_tokens=4, min_tokens=1, length_penalty=-1.0, n=2),
            id="fields override the preset",
        ),
        pytest.param(
            {"preset": "caption", "min_tokens": 0, "early_stopping": True, "stop": "."},
            SamplingParams(num_beams=5, max_tokens=30, early_stopping=True, stop=(".",)),
            id="an explicit 0 overrides the preset too",
        ),
        pytest.param(
            {"preset": "caption", "max_tokens": 5},
            SamplingParams(num_beams=5, max_tokens=5, min_tokens=5),
            id="a lower limit lowers the preset's minimum",
        ),
        pytest.param(
            {"preset": "caption", "num_beams": 1, "temperature": 0.7, "top_p": 0.9},
            SamplingParams(temperature=0.7, top_p=0.9, max_tokens=30, min_tokens=8),
            id="samples of a preset's length",
        ),
    ],
)
def test_a_preset_is_a_set_of_defaults(fields: dict[str, Any], expected: SamplingParams) -> None:
    assert params(**fields) == expected


def test_max_completion_tokens_overrides_a_preset_too() -> None:
    made = chat(preset="caption", max_completion_tokens=6, seed=0).sampling_params()

    assert (made.max_tokens, made.min_tokens) == (6, 6)


def test_a_preset_may_be_used_without_beams() -> None:
    made = params(preset="vqa", num_beams=1)

    assert (made.num_beams, made.max_tokens) == (1, 10)


# -- log-probabilities -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        pytest.param({}, None, id="absent"),
        pytest.param({"logprobs": False, "top_logprobs": 0}, None, id="off"),
        pytest.param({"logprobs": True}, 0, id="generated tokens only"),
        pytest.param({"logprobs": True, "top_logprobs": 5}, 5, id="five likeliest tokens too"),
    ],
)
def test_a_chat_asks_for_log_probabilities_by_two_fields(
    fields: dict[str, Any], expected: int | None
) -> None:
    assert chat(**fields).sampling_params().top_logprobs == expected


@pytest.mark.parametrize("logprobs", [None, 0, 5])
def test_generate_asks_for_log_probabilities_by_one_number(logprobs: int | None) -> None:
    request = GenerateRequest.model_validate({"image": "x", "logprobs": logprobs})

    assert request.sampling_params().top_logprobs == logprobs


def test_top_logprobs_without_logprobs_is_refused() -> None:
    for fields in ({"top_logprobs": 3}, {"top_logprobs": 3, "logprobs": False}):
        with pytest.raises(InvalidRequest) as caught:
            chat(**fields)
        assert caught.value.param == "top_logprobs"


@pytest.mark.parametrize(
    ("kind", "fields"),
    [
        pytest.param(ChatRequest, {"logprobs": True, "top_logprobs": 21}, id="chat: too many"),
        pytest.param(ChatRequest, {"logprobs": 5}, id="chat: a number"),
        pytest.param(ChatRequest, {"logprobs": True, "top_logprobs": -1}, id="chat: negative"),
        pytest.param(GenerateRequest, {"logprobs": 21}, id="generate: too many"),
        pytest.param(GenerateRequest, {"top_logprobs": 1}, id="generate: top_logprobs"),
        pytest.param(CaptionRequest, {"logprobs": 1}, id="captions"),
    ],
)
def test_wrong_fields_for_log_probabilities_are_refused(kind: Any, fields: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        kind.model_validate(
            {"messages": MESSAGES, **fields} if kind is ChatRequest else {"image": "x", **fields}
        )


# -- limits and streams ----------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["max_tokens", "max_completion_tokens"])
def test_a_chat_accepts_its_limit_by_either_name(name: str) -> None:
    assert chat(**{name: 5}).sampling_params().max_tokens == 5
    with pytest.raises(InvalidRequest, match=rf"min_tokens must not exceed {name} \(5\)$"):
        chat(**{name: 5}, min_tokens=6).sampling_params()


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        pytest.param({}, set(), id="stream off"),
        pytest.param({"stream": True}, set(), id="no options"),
        pytest.param({"stream": True, "stream_options": {}}, set(), id="empty options"),
        pytest.param(
            {
                "stream": True,
                "stream_options": {
                    "include_usage": True,
                    "include_timing": True,
                    "include_beams": False,
                },
            },
            {"usage", "timing"},
            id="some",
        ),
        pytest.param({"stream": False, "stream_options": None}, set(), id="null options"),
    ],
)
def test_a_stream_includes_what_is_asked_for(fields: dict[str, Any], expected: set[str]) -> None:
    assert GenerateRequest.model_validate({"image": "x", **fields}).included == expected


def test_a_caption_request_has_one_image_or_several() -> None:
    assert CaptionRequest(image="a").urls == ["a"]
    assert CaptionRequest(images=["a", "b"]).urls == ["a", "b"]


def test_uploads_accept_all_fields_of_captions_but_the_images() -> None:
    assert CaptionRequest.model_fields.keys() - CaptionFields.model_fields.keys() == {
        "image",
        "images",
    }


@pytest.mark.parametrize("request_type", [ChatRequest, GenerateRequest, CaptionRequest])
def test_every_field_has_a_description(request_type: type[BaseModel]) -> None:
    described = request_type.model_json_schema()["properties"]

    for name, field in described.items():
        assert field.get("description", "").endswith("."), name
