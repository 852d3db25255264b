"""Requests of clients to /v1/responses and /v1/completions, after public bug reports.

OpenAI's own client sends them and reads the answers, over a fake backend.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any

import httpx2
import openai
import pytest

from blip2_serve.config import AppConfig
from blip2_serve.http.api import create_app
from support.fake_backend import TEXT, FakeBackend, chat
from support.images import data_url
from support.recorder import FakeRecorder

URL = data_url(b"picture")
ANSWER = f"picture:{TEXT}".strip()
IMAGE: Any = {"type": "input_image", "image_url": URL, "detail": "auto"}


def text(text: str, kind: str = "input_text") -> Any:
    return {"type": kind, "text": text}


def says(role: str, *content: Any) -> Any:
    return {"role": role, "content": [*content]}


ASKED = says("user", IMAGE, text("what is it?"))


@pytest.fixture
def backend() -> FakeBackend:
    return FakeBackend()


@pytest.fixture
async def client(backend: FakeBackend) -> AsyncIterator[openai.AsyncOpenAI]:
    app = create_app(backend, AppConfig(), FakeRecorder())
    transport = httpx2.ASGITransport(app)
    async with (
        httpx2.AsyncClient(transport=transport) as http,
        openai.AsyncOpenAI(
            base_url="http://test/v1", api_key="unused", max_retries=0, http_client=http
        ) as client,
    ):
        yield client


# vLLM #46631: a picture that chat completions take fails as a response
async def test_the_same_picture_and_question_are_the_same_in_both_apis(
    client: openai.AsyncOpenAI, backend: FakeBackend
) -> None:
    answer = await client.chat.completions.create(model="demo", **chat(seed=1))
    response = await client.responses.create(model="demo", input=[ASKED], extra_body={"seed": 1})

    assert response.output_text == answer.choices[0].message.content == ANSWER
    assert backend.prompts[0] == backend.prompts[1]
    assert backend.encoded == [b"picture"] * 2
    assert backend.params[0] == backend.params[1]


@pytest.mark.parametrize(
    "name",
    [
        pytest.param("parallel_tool_calls", id="vLLM #48097"),
        "instructions",
        "metadata",
        "previous_response_id",
        "reasoning",
        "store",
        "temperature",
        "text",
        "tools",
        "top_logprobs",
        "truncation",
    ],
)
async def test_null_in_a_response_is_not_given(client: openai.AsyncOpenAI, name: str) -> None:
    response = await client.responses.create(model="demo", input=[ASKED], extra_body={name: None})

    assert response.output_text == ANSWER
    assert response.parallel_tool_calls is True


@pytest.mark.parametrize(
    "answer",
    [
        pytest.param(
            says("assistant", text("red", "output_text")), id="DeepSeek-v4-Flash-DSpark #138"
        ),
        pytest.param({"role": "assistant", "content": "red"}, id="a string"),
        pytest.param(
            {**says("assistant", text("red", "output_text")), "id": "msg_1", "type": "message"},
            id="with an id and without a status",
        ),
    ],
)
async def test_an_earlier_answer_is_taken_in_every_form(
    client: openai.AsyncOpenAI, backend: FakeBackend, answer: Any
) -> None:
    history = [ASKED, answer, says("user", text("and now?"))]
    await client.responses.create(model="demo", input=history)

    assert backend.prompts == ["Question: what is it? Answer: red. Question: and now? Answer:"]


# gemini-web2api #57: clients show nothing if an event of the sequence is missing
async def test_a_client_that_follows_every_event_gets_the_whole_text(
    client: openai.AsyncOpenAI,
) -> None:
    async with client.responses.stream(model="demo", input=[ASKED]) as stream:
        texts = [e.delta async for e in stream if e.type == "response.output_text.delta"]
        final = await stream.get_final_response()

    assert "".join(texts) == final.output_text == ANSWER
    assert len(texts) > 3


@pytest.mark.parametrize(
    "image",
    [
        pytest.param({"image": URL}, id="as /v1/generate has it"),
        pytest.param({"image_urls": [URL]}, id="vLLM #50489"),
        pytest.param({"media_urls": {"image": [URL]}}, id="vLLM #50648"),
        pytest.param({"multi_modal_data": {"image": URL}}, id="LLM.generate of vLLM"),
    ],
)
async def test_a_completion_takes_a_picture_in_the_forms_that_vllms_users_know(
    client: openai.AsyncOpenAI, backend: FakeBackend, image: dict[str, Any]
) -> None:
    prompt = "Question: what is it? Answer:"
    answer = await client.completions.create(model="demo", prompt=prompt, extra_body=image)

    assert answer.choices[0].text == f" picture:{TEXT}"
    assert backend.prompts == [prompt]
    assert backend.encoded == [b"picture"]
