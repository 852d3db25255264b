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
            id="beams without a length penalty",
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
            id="strings, as multipart has them",
        ),
        pytest.param(
            {"num_beams": "3", "n": "2", "length_penalty": "0.5", "early_stopping": "true"},
            SamplingParams(num_beams=3, n=2, length_penalty=0.5, early_stopping=True),
            id="strings for beams",
        ),
        pytest.param(
            {"num_beams": "3", "early_stopping": "never"},
            SamplingParams(num_beams=3, early_stopping="never"),
            id="never is a word and no truth",
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
        pytest.param({"num_beams": 2, "temperature": 0.1}, "temperature", id="sampled beams"),
        pytest.param({"num_beams": 2, "top_p": 0.9}, "top_p", id="top_p of beams"),
        pytest.param({"num_beams": 2, "top_k": 9}, "top_k", id="top_k of beams"),
        pytest.param({"num_beams": 2, "n": 3}, "n", id="more answers than beams"),
        pytest.param({"n": 2}, "n", id="several greedy answers"),
        pytest.param({"n": 2, "temperature": 0}, "n", id="several answers at temperature zero"),
        pytest.param({"length_penalty": 2}, "length_penalty", id="a length penalty of one beam"),
        pytest.param({"length_penalty": 0}, "length_penalty", id="a length penalty of zero"),
        pytest.param({"early_stopping": True}, "early_stopping", id="early stopping of one beam"),
        pytest.param({"early_stopping": "never"}, "early_stopping", id="never, of one beam"),
        pytest.param(
            {"n": 2, "temperature": 1, "early_stopping": True},
            "early_stopping",
            id="early stopping of samples",
        ),
        pytest.param(
            {"preset": "caption", "temperature": 1}, "temperature", id="a preset's beams, sampled"
        ),
        pytest.param({"preset": "vqa", "n": 6}, "n", id="more answers than a preset has beams"),
        pytest.param(
            {"preset": "caption", "num_beams": 1, "length_penalty": 2},
            "length_penalty",
            id="a length penalty where a preset's beams are taken back",
        ),
        pytest.param(
            {"preset": "caption", "min_tokens": 31}, "min_tokens", id="least above a preset's most"
        ),
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
        pytest.param({"num_beams": 9}, id="nine beams"),
        pytest.param({"num_beams": 0}, id="no beams"),
        pytest.param({"n": 17, "temperature": 1}, id="seventeen answers"),
        pytest.param({"n": 0}, id="no answers"),
        pytest.param({"num_beams": 2, "length_penalty": 11}, id="a huge length penalty"),
        pytest.param({"num_beams": 2, "length_penalty": float("nan")}, id="no number as penalty"),
        pytest.param({"num_beams": 2, "early_stopping": "maybe"}, id="early stopping, maybe"),
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
            id="a caption as LAVIS makes it",
        ),
        pytest.param(
            {"preset": "vqa"},
            SamplingParams(num_beams=5, max_tokens=10, length_penalty=0.0),
            id="a short answer as LAVIS makes it",
        ),
        pytest.param(
            {"preset": "vqa", "length_penalty": -1, "num_beams": 3, "n": 2, "max_tokens": 4},
            SamplingParams(num_beams=3, max_tokens=4, length_penalty=-1.0, n=2),
            id="fields that are given win",
        ),
        pytest.param(
            {"preset": "caption", "min_tokens": 0, "early_stopping": True, "stop": "."},
            SamplingParams(num_beams=5, max_tokens=30, early_stopping=True, stop=(".",)),
            id="a zero that is given wins too",
        ),
        pytest.param(
            {"preset": "caption", "max_tokens": 5},
            SamplingParams(num_beams=5, max_tokens=5, min_tokens=5),
            id="a limit that is given cuts the preset's minimum",
        ),
        pytest.param(
            {"preset": "caption", "num_beams": 1, "temperature": 0.7, "top_p": 0.9},
            SamplingParams(temperature=0.7, top_p=0.9, max_tokens=30, min_tokens=8),
            id="a preset's lengths for a sample",
        ),
    ],
)
def test_a_preset_stands_for_parameters(fields: dict[str, Any], expected: SamplingParams) -> None:
    assert params(**fields) == expected


def test_a_presets_limit_goes_by_a_chats_other_name_too() -> None:
    made = chat(preset="caption", max_completion_tokens=6, seed=0).sampling_params()

    assert (made.max_tokens, made.min_tokens) == (6, 6)


def test_a_greedy_answer_may_have_a_presets_length() -> None:
    made = params(preset="vqa", num_beams=1)

    assert (made.num_beams, made.max_tokens) == (1, 10)


# -- log-probabilities -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        pytest.param({}, None, id="not asked for"),
        pytest.param({"logprobs": False, "top_logprobs": 0}, None, id="not wanted"),
        pytest.param({"logprobs": True}, 0, id="of the tokens alone"),
        pytest.param({"logprobs": True, "top_logprobs": 5}, 5, id="of the five likeliest too"),
    ],
)
def test_a_chat_asks_for_log_probabilities_as_openai_has_it(
    fields: dict[str, Any], expected: int | None
) -> None:
    assert chat(**fields).sampling_params().top_logprobs == expected


@pytest.mark.parametrize("logprobs", [None, 0, 5])
def test_a_generation_asks_for_log_probabilities_by_one_number(logprobs: int | None) -> None:
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
        pytest.param(ChatRequest, {"logprobs": True, "top_logprobs": 21}, id="too many in a chat"),
        pytest.param(ChatRequest, {"logprobs": 5}, id="a number in a chat"),
        pytest.param(ChatRequest, {"logprobs": True, "top_logprobs": -1}, id="less than none"),
        pytest.param(GenerateRequest, {"logprobs": 21}, id="too many in a generation"),
        pytest.param(GenerateRequest, {"top_logprobs": 1}, id="by the other name"),
        pytest.param(CaptionRequest, {"logprobs": 1}, id="of captions"),
    ],
)
def test_log_probabilities_out_of_range_are_refused(kind: Any, fields: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        kind.model_validate(
            {"messages": MESSAGES, **fields} if kind is ChatRequest else {"image": "x", **fields}
        )


# -- limits and streams ----------------------------------------------------------------------------


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
