"""OpenAI's Python client works with this server."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import openai
import pytest

from blip2_serve.demo import scenes
from support.images import image_message
from support.server import App


@pytest.fixture
def client(demo: App) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{demo.url}/v1", api_key="unused", max_retries=0) as client:
        yield client


def test_a_chat_can_send_the_clients_message_objects_back(
    client: openai.OpenAI,
) -> None:
    scene = scenes.sample(2_001)
    messages: list[Any] = [image_message(scene.image)]  # no question: a caption
    for question in ("how many shapes are there?", "what color is the background?", None):
        answer = client.chat.completions.create(model="demo", messages=messages, seed=1, user="me")
        choice = answer.choices[0]
        assert (choice.message.role, choice.finish_reason) == ("assistant", "stop")
        assert choice.message.content
        assert answer.usage is not None
        total = answer.usage.prompt_tokens + answer.usage.completion_tokens
        assert answer.usage.total_tokens == total
        if question:
            messages += [choice.message, {"role": "user", "content": question}]
    assert choice.message.content == scene.background


def test_a_stream_with_usage_adds_up_to_the_whole_answer(client: openai.OpenAI) -> None:
    messages: Any = [image_message(scenes.sample(2_002).image)]
    whole = client.chat.completions.create(model="demo", messages=messages)
    stream = client.chat.completions.create(
        model="demo", messages=messages, stream=True, stream_options={"include_usage": True}
    )
    chunks = list(stream)
    assert chunks[0].choices[0].delta.role == "assistant"
    text = "".join(c.choices[0].delta.content or "" for c in chunks if c.choices)
    assert text == whole.choices[0].message.content
    assert [c.choices[0].finish_reason for c in chunks if c.choices][-1] == "stop"
    assert chunks[-1].usage == whole.usage


async def test_the_async_client_can_stream(demo: App) -> None:
    async with openai.AsyncOpenAI(base_url=f"{demo.url}/v1", api_key="unused") as client:
        stream = await client.chat.completions.create(
            model="demo",
            messages=[image_message(scenes.sample(2_003).image, "how many shapes are there?")],  # type: ignore[list-item]
            stream=True,
        )
        text = "".join([c.choices[0].delta.content or "" async for c in stream])
    assert text in scenes.NUMBERS


def test_models_are_listed_and_retrieved(client: openai.OpenAI) -> None:
    names = ["demo", "demo:caption", "demo:vqa"]
    assert [model.id for model in client.models.list()] == names
    assert [client.models.retrieve(name).id for name in names] == names


def test_sampling_is_reproducible_with_a_seed(
    client: openai.OpenAI,
) -> None:
    messages: Any = [image_message(scenes.sample(2_004).image)]

    def sample(seed: int) -> str | None:
        answer = client.chat.completions.create(
            model="demo", messages=messages, temperature=2, seed=seed, max_tokens=20
        )
        return answer.choices[0].message.content

    assert sample(1) == sample(1)
    assert len({sample(seed) for seed in range(5)}) > 1


def test_samples_and_log_probabilities_are_the_same_whole_and_streamed(
    client: openai.OpenAI,
) -> None:
    request: dict[str, Any] = {
        "model": "demo",
        "messages": [image_message(scenes.sample(2_006).image)],
        "n": 3,
        "temperature": 1,
        "seed": 7,
        "max_tokens": 12,
        "logprobs": True,
        "top_logprobs": 2,
    }
    whole = client.chat.completions.create(**request)
    assert [choice.index for choice in whole.choices] == [0, 1, 2]
    streamed = {choice.index: ("", b"") for choice in whole.choices}
    for chunk in client.chat.completions.create(**request, stream=True):
        (choice,) = chunk.choices
        text, spelled = streamed[choice.index]
        text += choice.delta.content or ""
        if choice.logprobs is not None:
            spelled += b"".join(bytes(t.bytes or []) for t in choice.logprobs.content or [])
        streamed[choice.index] = (text, spelled)
    for choice in whole.choices:
        assert choice.logprobs is not None
        assert choice.logprobs.content is not None
        assert all(len(token.top_logprobs) == 2 for token in choice.logprobs.content)
        assert all(token.logprob <= 0 for token in choice.logprobs.content)
        text, spelled = streamed[choice.index]
        assert text == choice.message.content
        assert text in spelled.decode(errors="replace")


def test_beam_search_works_through_extra_body(
    client: openai.OpenAI,
) -> None:
    messages: Any = [image_message(scenes.sample(2_007).image)]

    def answers(n: int) -> list[str | None]:
        extra = {"num_beams": 4, "length_penalty": 0.5}
        answer = client.chat.completions.create(
            model="demo", messages=messages, n=n, extra_body=extra
        )
        return [choice.message.content for choice in answer.choices]

    assert answers(1) == answers(4)[:1]
    assert len(answers(4)) == 4


@pytest.mark.parametrize(
    ("change", "error"),
    [
        pytest.param({"model": "gpt-5"}, openai.NotFoundError, id="unknown model"),
        pytest.param({"max_tokens": 0}, openai.BadRequestError, id="no tokens"),
        pytest.param(
            {"extra_body": {"best_of": 2}}, openai.BadRequestError, id="unknown parameter"
        ),
        pytest.param(
            {"messages": [{"role": "user", "content": "hello"}]},
            openai.BadRequestError,
            id="no image",
        ),
    ],
)
def test_bad_requests_raise_the_clients_errors(
    client: openai.OpenAI, change: dict[str, Any], error: type[openai.APIStatusError]
) -> None:
    request: dict[str, Any] = {
        "model": "demo",
        "messages": [image_message(scenes.sample(2_005).image)],
        **change,
    }
    with pytest.raises(error) as raised:
        client.chat.completions.create(**request)
    assert raised.value.type == "invalid_request_error"
