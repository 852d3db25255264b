"""/v1/completions over a fake backend; OpenAI's own types read whatever it answers."""

from __future__ import annotations

from typing import Any

import httpx
import pytest
from openai.types import Completion

from blip2_serve.errors import InvalidImage
from support.fake_backend import (
    PROMPT_TOKENS,
    TEXT,
    TOKEN_IDS,
    FakeBackend,
    error_of,
    events_of,
    post,
)
from support.images import data_url

ROUTE = "/v1/completions"
URL = data_url(b"picture")
FORMS = [
    pytest.param({"image": URL}, id="image"),
    pytest.param({"image_urls": [URL]}, id="image_urls"),
    pytest.param({"media_urls": {"image": [URL]}}, id="media_urls"),
    pytest.param({"multi_modal_data": {"image": URL}}, id="multi_modal_data"),
    pytest.param({"multi_modal_data": {"image": [URL]}}, id="multi_modal_data with a list"),
    pytest.param({"image": URL, "image_urls": None, "media_urls": None}, id="null beside it"),
]


@pytest.mark.parametrize("prompt", [" as {it} is ", [" as {it} is "]], ids=["string", "list"])
@pytest.mark.parametrize("form", FORMS)
async def test_every_form_of_image_and_prompt_means_the_same(
    client: httpx.AsyncClient, backend: FakeBackend, form: dict[str, Any], prompt: Any
) -> None:
    response = await post(client, ROUTE, {"model": "demo", "prompt": prompt, **form})

    assert response.status_code == 200, response.text
    assert backend.encoded == [b"picture"]
    assert backend.prompts == [" as {it} is "]


async def test_the_answer_is_openais_completion_with_the_text_as_generated(
    client: httpx.AsyncClient,
) -> None:
    response = await post(client, ROUTE, {"image": URL, "prompt": "a photo of", "logprobs": 1})
    completion = Completion.model_validate(response.json())

    (choice,) = completion.choices
    assert completion.id.startswith("cmpl-")
    assert completion.object == "text_completion"
    assert (choice.text, choice.finish_reason) == (f" picture:{TEXT}", "stop")
    assert choice.logprobs is not None
    assert choice.logprobs.tokens is not None
    assert "".join(choice.logprobs.tokens) == choice.text
    assert choice.logprobs.token_logprobs == [-0.5] * len(TOKEN_IDS)
    assert choice.logprobs.top_logprobs == [{"?": -2.0}] * len(TOKEN_IDS)
    assert choice.logprobs.text_offset is not None
    assert choice.logprobs.text_offset[:2] == [0, len(choice.logprobs.tokens[0])]
    assert completion.usage is not None
    assert completion.usage.prompt_tokens == PROMPT_TOKENS


async def test_a_stream_adds_up_to_the_whole_text(client: httpx.AsyncClient) -> None:
    asked = {"image_urls": [URL], "stream": True, "stream_options": {"include_usage": True}}
    *sent, done = events_of(await post(client, ROUTE, asked))
    *chunks, last = [Completion.model_construct(**chunk) for chunk in sent]

    assert done == "[DONE]"
    assert "".join(chunk.choices[0].text for chunk in chunks) == f" picture:{TEXT}"
    assert last.choices == []
    assert last.usage is not None


async def test_a_request_without_a_prompt_asks_for_a_caption(
    client: httpx.AsyncClient, backend: FakeBackend
) -> None:
    for prompt in ("", None):
        assert (await post(client, ROUTE, {"image": URL, "prompt": prompt})).status_code == 200

    assert backend.prompts == ["", ""]


@pytest.mark.parametrize(
    ("change", "param", "words"),
    [
        pytest.param({"image": None}, "image", "extra_body", id="no image"),
        pytest.param({"image": ""}, "image", "required", id="an empty image"),
        pytest.param({"image_urls": [URL]}, "image_urls", "one image", id="two forms"),
        pytest.param({"image": None, "image_urls": []}, "image_urls", "1", id="no URLs"),
        pytest.param({"image": None, "image_urls": [URL, URL]}, "image_urls", "1", id="two URLs"),
        pytest.param(
            {"image": None, "multi_modal_data": {"image": URL, "video": URL}},
            "multi_modal_data",
            "video",
            id="a video beside it",
        ),
        pytest.param(
            {"image": None, "multi_modal_data": {"image": "ftp://x"}},
            "multi_modal_data",
            "data URL",
            id="an URL of another kind",
        ),
        pytest.param({"prompt": ["a", "b"]}, "prompt", "one prompt", id="two prompts"),
        pytest.param({"prompt": []}, "prompt", "one prompt", id="no prompts"),
        pytest.param({"prompt": [1, 2]}, "prompt", "token ids", id="token ids"),
        pytest.param({"prompt": [[1, 2]]}, "prompt", "token ids", id="a list of token ids"),
        pytest.param({"prompt": 7}, "prompt", "string", id="a number"),
        pytest.param({"echo": True}, "echo", "never part", id="echo"),
        pytest.param({"suffix": "end"}, "suffix", "suffix", id="suffix"),
        pytest.param({"best_of": 2}, "best_of", "n (1)", id="best_of above n"),
    ],
)
async def test_a_bad_request_is_a_400_that_names_the_field_and_says_what_to_do(
    client: httpx.AsyncClient, change: dict[str, Any], param: str, words: str
) -> None:
    sent = {name: value for name, value in {"image": URL, **change}.items() if value is not None}
    response = await post(client, ROUTE, sent)

    error = error_of(response)
    assert response.status_code == 400
    assert error["param"] == param
    assert words in error["message"]


async def test_neutral_values_of_openais_parameters_are_accepted(
    client: httpx.AsyncClient,
) -> None:
    neutral = {"echo": False, "suffix": "", "best_of": 1, "n": 1, "user": "me", "logit_bias": {}}
    response = await post(client, ROUTE, {"image": URL, **neutral})

    assert response.status_code == 200, response.text


@pytest.mark.parametrize("form", FORMS)
async def test_a_broken_image_names_the_field_that_had_it(
    client: httpx.AsyncClient, backend: FakeBackend, form: dict[str, Any]
) -> None:
    backend.failures[b"picture"] = InvalidImage("not an image")
    for stream in (False, True):
        response = await post(client, ROUTE, {**form, "stream": stream})

        assert response.status_code == 400
        assert error_of(response)["param"] == next(iter(form))
