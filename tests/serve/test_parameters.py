"""OpenAI's parameters through the whole application: the same tokens as transformers."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import httpx
import pytest
import torch
from PIL import Image

from blip2_serve.demo import scenes
from blip2_serve.types import SamplingParams
from support.images import data_url
from support.oracle import Oracle
from support.penalties import OpenAIPenalties
from support.server import App

IMAGES = [scenes.sample(8_200 + i).image for i in range(3)]
QUESTION = "Question: what is there? Answer:"
POSITIONS = 512  # of the shipped checkpoint


def generate(app: App, image: Image.Image = IMAGES[0], **more: Any) -> dict[str, Any]:
    body = {"image": data_url(image), "max_tokens": 12, "return_token_ids": True, **more}
    response = app.post("/v1/generate", json=body)
    assert response.status_code == 200, response.text
    answer: dict[str, Any] = response.json()
    return answer


def ids_of(answer: dict[str, Any]) -> list[list[int]]:
    return [choice["token_ids"] for choice in answer["choices"]]


@pytest.mark.parametrize(
    "narrowing",
    [
        pytest.param({"temperature": 0, "top_p": 0.95}, id="candle-vllm #307: top_p"),
        pytest.param({"temperature": 0, "top_k": 40}, id="top_k"),
        pytest.param({"temperature": 0.7, "top_p": 0}, id="TGI #2222: top_p 0"),
        pytest.param({"top_p": 1, "top_k": 0, "n": 1, "seed": 9}, id="neutral values"),
    ],
)
def test_a_greedy_answer_stays_greedy(
    random_model: tuple[App, Oracle], narrowing: dict[str, Any]
) -> None:
    app, _ = random_model
    plain = generate(app)

    assert ids_of(generate(app, **narrowing)) == ids_of(plain)


def test_samples_without_a_temperature_are_those_of_temperature_1(demo: App) -> None:
    for narrowing in ({"top_p": 0.9}, {"top_k": 9}, {"n": 3}):
        body = {"seed": 3, "prompt": QUESTION, "ignore_eos": True, **narrowing}
        implied, explicit = generate(demo, **body), generate(demo, **body, temperature=1)
        assert ids_of(implied) == ids_of(explicit) != ids_of(generate(demo, **body, temperature=0))


def test_equal_answers_take_the_steps_of_one(demo: App) -> None:
    async def steps_of(n: int) -> tuple[int, dict[str, Any]]:
        before = (await demo.until_idle())["steps"]
        body = {"image": data_url(IMAGES[0]), "max_tokens": 20, "ignore_eos": True, "n": n}
        async with demo.client() as client:
            response = await client.post("/v1/generate", json={**body, "temperature": 0})
        answer: dict[str, Any] = response.json()
        return (await demo.until_idle())["steps"] - before, answer

    steps, answer = asyncio.run(steps_of(16))
    assert len(answer["choices"]) == 16
    assert len({choice["text"] for choice in answer["choices"]}) == 1
    assert answer["usage"]["completion_tokens"] == 16 * 20
    assert steps == 20


@pytest.mark.parametrize("num_beams", [1, 3])
@pytest.mark.parametrize(
    "params",
    [
        pytest.param({"frequency_penalty": 0.8}, id="frequency penalty"),
        pytest.param({"presence_penalty": 1.5}, id="presence penalty"),
        pytest.param({"frequency_penalty": -0.5, "presence_penalty": -1.0}, id="negative ones"),
        pytest.param({"logit_bias": {"300": 30, "41": -100, "7": 27.5}}, id="biases"),
        pytest.param(
            {"frequency_penalty": 0.3, "logit_bias": {"5": 12}, "repetition_penalty": 1.2},
            id="together",
        ),
    ],
)
def test_penalties_and_biases_give_the_tokens_of_openais_formulas(
    random_model: tuple[App, Oracle], params: dict[str, Any], num_beams: int
) -> None:
    app, oracle = random_model
    changed = 0
    for image in IMAGES:
        biases = tuple((int(i), float(v)) for i, v in params.get("logit_bias", {}).items())
        own = SamplingParams(
            frequency_penalty=params.get("frequency_penalty", 0.0),
            presence_penalty=params.get("presence_penalty", 0.0),
            logit_bias=biases,
        )
        inputs = oracle.processor(images=image, text=QUESTION, return_tensors="pt")
        processor = OpenAIPenalties(own, inputs["input_ids"].shape[1])
        with torch.inference_mode():
            expected = oracle.tokens(
                image,
                QUESTION,
                max_new_tokens=12,
                num_beams=num_beams,
                repetition_penalty=params.get("repetition_penalty", 1.0),
                logits_processor=[processor],
            )
        made = generate(app, image, prompt=QUESTION, num_beams=num_beams, **params)
        assert oracle.without_eos(ids_of(made)[0]) == expected
        plain = generate(app, image, prompt=QUESTION, num_beams=num_beams)
        changed += ids_of(plain) != ids_of(made)
    assert changed


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "streamed"])
def test_a_limit_of_evaluation_tools_is_cut_to_the_room(demo: App, stream: bool) -> None:
    body = {
        "image": data_url(IMAGES[0]),
        "prompt": "red " * 400,
        "max_tokens": 2048,
        "ignore_eos": True,
        "stream": stream,
        "stream_options": {"include_usage": True} if stream else None,
    }
    response = demo.post("/v1/generate", json=body)

    assert response.status_code == 200, response.text
    last = response.text.split("\n\n")[-3].removeprefix("data: ") if stream else response.text
    assert json.loads(last)["usage"]["total_tokens"] == POSITIONS


LONG = {"image": data_url(IMAGES[0]), "max_tokens": 450, "ignore_eos": True}


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "streamed"])
def test_a_request_that_runs_out_of_time_gets_an_openai_error(demo: App, stream: bool) -> None:
    """Ray #37942. Either Ray Serve's proxy cuts first, or the ingress."""
    for limit in (0.001, 0.003, 0.01, 0.02, 0.05, 0.1):
        headers = {"x-request-timeout-seconds": str(limit)}
        response = demo.post("/v1/generate", json={**LONG, "stream": stream}, headers=headers)
        if response.status_code == httpx.codes.OK:
            assert stream
            event = response.text.rstrip().split("\n\n")[-1].removeprefix("data: ")
            assert json.loads(event)["error"]["code"] in ("timeout", "unavailable")
        else:
            assert response.status_code == httpx.codes.REQUEST_TIMEOUT
            assert response.headers["content-type"] == "application/json"
            assert response.json()["error"]["code"] == "timeout"


def test_work_that_ran_out_of_time_stops(demo: App) -> None:
    async def steps() -> int:
        before = (await demo.until_idle())["steps"]
        headers = {"x-request-timeout-seconds": "0.3"}
        async with demo.client() as client:
            response = await client.post("/v1/generate", json=LONG, headers=headers)
        assert response.status_code == httpx.codes.REQUEST_TIMEOUT
        return int((await demo.until_idle())["steps"]) - before

    assert asyncio.run(steps()) < LONG["max_tokens"]
