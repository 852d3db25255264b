"""Evaluation tools that can send no preset get transformers' answers to the preset's own prompt.

Their requests are rebuilt from the adapters for OpenAI's API in lmms-eval and VLMEvalKit: order of
the parts, instructions after the question, limits far above any answer.
"""

from __future__ import annotations

from typing import Any

import httpx
import pytest
from PIL import Image

from blip2_serve.demo import scenes
from support.images import data_url, encode
from support.oracle import Oracle
from support.server import App

QUESTION = "What color is the shape at the top left?"
WORD = "Answer the question using a single word or phrase."
YES_NO = "Please answer yes or no."
CAPTION: dict[str, Any] = {"num_beams": 5, "min_new_tokens": 8, "max_new_tokens": 30}
VQA: dict[str, Any] = {
    "num_beams": 5,
    "min_new_tokens": 1,
    "max_new_tokens": 10,
    "length_penalty": 0.0,
}


def lmms_eval(image: Image.Image, text: str) -> dict[str, Any]:
    """The text comes first, and the limit has OpenAI's newer name."""
    parts = [
        {"type": "text", "text": text},
        {"type": "image_url", "image_url": {"url": data_url(image)}},
    ]
    return {
        "messages": [{"role": "user", "content": parts}],
        "max_completion_tokens": 1024,
        "temperature": 0,
    }


def lmms_eval_gpt4v(image: Image.Image, text: str) -> dict[str, Any]:
    """A place for the image in the text divides it."""
    before, _, after = text.partition("\n")
    parts = [
        {"type": "text", "text": before},
        {"type": "image_url", "image_url": {"url": data_url(image)}},
        {"type": "text", "text": after},
    ]
    return {
        "messages": [{"role": "user", "content": parts}],
        "max_tokens": 512,
        "temperature": 0,
    }


def vlmevalkit(image: Image.Image, text: str) -> dict[str, Any]:
    """The image comes first, with a detail; there is a system prompt."""
    url = data_url(encode(image), "image/jpeg")  # lossless, so that the answers can be compared
    parts = [
        {"type": "image_url", "image_url": {"url": url, "detail": "low"}},
        {"type": "text", "text": text},
    ]
    return {
        "messages": [
            {"role": "system", "content": "You are a helpful assistant."},
            {"role": "user", "content": parts},
        ],
        "n": 1,
        "temperature": 0,
        "max_tokens": 2048,
    }


def token_ids(app: App, oracle: Oracle, model: str, body: dict[str, Any]) -> list[int]:
    body = {**body, "model": model, "return_token_ids": True}
    answer = app.post("/v1/chat/completions", json=body)
    assert answer.status_code == httpx.codes.OK, answer.text
    assert answer.json()["model"] == model
    return oracle.without_eos(answer.json()["choices"][0]["token_ids"])


@pytest.mark.parametrize("adapter", [lmms_eval, lmms_eval_gpt4v, vlmevalkit])
@pytest.mark.parametrize(
    ("preset", "text", "prompt", "settings"),
    [
        pytest.param(
            "caption", "Describe the image briefly.", "a photo of", CAPTION, id="a caption"
        ),
        pytest.param(
            "caption",
            "Provide a one-sentence caption for the provided image.\nUse no names.",
            "a photo of",
            CAPTION,
            id="a caption, on two lines",
        ),
        pytest.param(
            "vqa", f"{QUESTION}\n{WORD}", f"Question: {QUESTION} Short answer:", VQA, id="vqa"
        ),
        pytest.param(
            "vqa",
            f"Is it red? {YES_NO}\n{WORD}",
            "Question: Is it red? Short answer:",
            VQA,
            id="yes or no",
        ),
    ],
)
def test_an_alias_answers_as_transformers_does_to_the_presets_prompt(
    random_model: tuple[App, Oracle],
    adapter: Any,
    preset: str,
    text: str,
    prompt: str,
    settings: dict[str, Any],
) -> None:
    app, oracle = random_model
    (name, *_) = (model["id"] for model in httpx.get(f"{app.url}/v1/models").json()["data"])
    for seed in (41, 42):
        image = scenes.sample(seed).image
        expected = oracle.tokens(image, prompt, **settings)
        body = adapter(image, text)
        assert token_ids(app, oracle, f"{name}:{preset}", body) == expected
        # Guard against a trivial comparison: the prompt and the settings matter.
        plain = {"messages": body["messages"], "max_tokens": settings["max_new_tokens"]}
        assert token_ids(app, oracle, name, plain) != expected
