"""Real clients get the same captions of two pictures as a plain HTTP request, byte for byte.

docs/api.md has a table of these tests, one tick each; tests/docs/test_clients.py compares them.
"""

from __future__ import annotations

import base64
import importlib
import socket
from collections.abc import AsyncIterator, Iterator
from typing import Any

import openai
import pytest

from blip2_serve.demo import scenes
from support.images import data_url, image_message
from support.server import App

PICTURES = [data_url(scenes.sample(seed).image) for seed in (9_101, 9_102)]
QUESTION = "how many shapes are there?"


def chat(url: str, text: str | None = None) -> Any:
    """The messages of a chat, with a question or for a caption."""
    return [image_message(base64.b64decode(url.partition(",")[2]), text)]


def response_input(url: str, text: str | None = None) -> Any:
    """The same in the Responses API."""
    parts = [{"type": "input_image", "image_url": url, "detail": "auto"}]
    return [
        {
            "role": "user",
            "content": [*parts, *([{"type": "input_text", "text": text}] * bool(text))],
        }
    ]


@pytest.fixture(scope="module")
def captions(demo: App) -> list[str]:
    """What a plain HTTP request gets for each picture."""
    bodies = [{"messages": chat(url)} for url in PICTURES]
    answers = [demo.post("/v1/chat/completions", json=body).json() for body in bodies]
    texts = [answer["choices"][0]["message"]["content"] for answer in answers]
    assert len({*texts}) == len(PICTURES)
    return texts


@pytest.fixture(scope="module")
def completions(demo: App) -> list[str]:
    """What a plain HTTP request for a raw completion gets for each picture."""
    bodies = [{"image": url, "prompt": "a photo of"} for url in PICTURES]
    answers = [demo.post("/v1/generate", json=body).json() for body in bodies]
    texts: list[str] = [answer["choices"][0]["text"] for answer in answers]
    assert len({*texts}) == len(PICTURES)
    return texts


@pytest.fixture(autouse=True)
def this_machine_only(monkeypatch: pytest.MonkeyPatch) -> None:
    """Clients that look for updates, prices or a place to report to would fail."""
    connect, look_up = socket.socket.connect, socket.getaddrinfo

    def connect_here(self: socket.socket, address: Any) -> None:
        if self.family in (socket.AF_INET, socket.AF_INET6):
            assert address[0] in ("127.0.0.1", "::1"), address
        connect(self, address)

    def look_up_here(host: Any, *args: Any, **kwargs: Any) -> Any:
        assert host in (None, "127.0.0.1", "::1", "localhost"), host
        return look_up(host, *args, **kwargs)

    monkeypatch.setattr(socket.socket, "connect", connect_here)
    monkeypatch.setattr(socket, "getaddrinfo", look_up_here)
    monkeypatch.setenv("LANGSMITH_TRACING", "false")
    monkeypatch.setenv("LITELLM_LOCAL_MODEL_COST_MAP", "True")


# -- openai ----------------------------------------------------------------------------------------


@pytest.fixture
def client(demo: App) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{demo.url}/v1", api_key="unused", max_retries=0) as client:
        yield client


@pytest.fixture
async def async_client(demo: App) -> AsyncIterator[openai.AsyncOpenAI]:
    async with openai.AsyncOpenAI(base_url=f"{demo.url}/v1", api_key="unused") as client:
        yield client


def assert_in_pieces(counts: list[int]) -> None:
    """Asserts that one of the answers came in so many pieces that it was streamed.

    A client that is slow for a moment finds several tokens at once, but not each time.
    """
    assert max(counts) > 3, counts


def test_openai_chat(client: openai.OpenAI, captions: list[str]) -> None:
    answers = [client.chat.completions.create(model="demo", messages=chat(url)) for url in PICTURES]
    assert [answer.choices[0].message.content for answer in answers] == captions


def test_openai_chat_streaming(client: openai.OpenAI, captions: list[str]) -> None:
    counts = []
    for url, caption in zip(PICTURES, captions, strict=True):
        stream = client.chat.completions.create(model="demo", messages=chat(url), stream=True)
        pieces = [chunk.choices[0].delta.content or "" for chunk in stream]
        assert "".join(pieces) == caption
        counts.append(len(pieces))
    assert_in_pieces(counts)


async def test_openai_chat_async(async_client: openai.AsyncOpenAI, captions: list[str]) -> None:
    for url, caption in zip(PICTURES, captions, strict=True):
        answer = await async_client.chat.completions.create(model="demo", messages=chat(url))
        assert answer.choices[0].message.content == caption


async def test_openai_chat_async_streaming(
    async_client: openai.AsyncOpenAI, captions: list[str]
) -> None:
    for url, caption in zip(PICTURES, captions, strict=True):
        stream = await async_client.chat.completions.create(
            model="demo", messages=chat(url), stream=True
        )
        assert "".join([c.choices[0].delta.content or "" async for c in stream]) == caption


def test_openai_responses(client: openai.OpenAI, captions: list[str]) -> None:
    answers = [client.responses.create(model="demo", input=response_input(u)) for u in PICTURES]
    assert [answer.output_text for answer in answers] == captions
    assert {answer.status for answer in answers} == {"completed"}


def test_openai_responses_streaming(client: openai.OpenAI, captions: list[str]) -> None:
    counts = []
    for url, caption in zip(PICTURES, captions, strict=True):
        stream = client.responses.create(model="demo", input=response_input(url), stream=True)
        *events, last = [*stream]
        deltas = [event.delta for event in events if event.type == "response.output_text.delta"]
        assert "".join(deltas) == caption
        assert last.type == "response.completed"
        assert last.response.output_text == caption
        counts.append(len(deltas))
    assert_in_pieces(counts)


def test_openai_responses_stream_helper(client: openai.OpenAI, captions: list[str]) -> None:
    """The client puts the events together by itself, and checks their order."""
    for url, caption in zip(PICTURES, captions, strict=True):
        with client.responses.stream(model="demo", input=response_input(url)) as stream:
            assert stream.get_final_response().output_text == caption


async def test_openai_responses_async(
    async_client: openai.AsyncOpenAI, captions: list[str]
) -> None:
    for url, caption in zip(PICTURES, captions, strict=True):
        answer = await async_client.responses.create(model="demo", input=response_input(url))
        assert answer.output_text == caption


async def test_openai_responses_async_streaming(
    async_client: openai.AsyncOpenAI, captions: list[str]
) -> None:
    for url, caption in zip(PICTURES, captions, strict=True):
        stream = await async_client.responses.create(
            model="demo", input=response_input(url), stream=True
        )
        deltas = [e.delta async for e in stream if e.type == "response.output_text.delta"]
        assert "".join(deltas) == caption


def test_openai_responses_history(client: openai.OpenAI) -> None:
    """The output of a response is sent back as it came."""
    history = response_input(PICTURES[0], QUESTION)
    for question in (QUESTION, "what color is the background?"):
        first = client.responses.create(model="demo", input=history)
        history += [*first.output, {"role": "user", "content": question}]
    messages = chat(PICTURES[0], QUESTION)
    for question in (QUESTION, "what color is the background?"):
        answer = client.chat.completions.create(model="demo", messages=messages)
        messages += [answer.choices[0].message, {"role": "user", "content": question}]

    assert first.output_text == answer.choices[0].message.content
    assert first.usage is not None
    assert answer.usage is not None
    assert first.usage.input_tokens == answer.usage.prompt_tokens


def test_openai_responses_errors(client: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError) as raised:
        client.responses.create(
            model="demo", input=response_input(PICTURES[0]), previous_response_id="resp_1"
        )
    assert raised.value.param == "previous_response_id"
    assert "nothing is stored" in raised.value.message


def test_openai_completions(client: openai.OpenAI, completions: list[str]) -> None:
    answers = [
        client.completions.create(model="demo", prompt="a photo of", extra_body={"image": url})
        for url in PICTURES
    ]
    assert [answer.choices[0].text for answer in answers] == completions


def test_openai_completions_streaming(client: openai.OpenAI, completions: list[str]) -> None:
    for url, text in zip(PICTURES, completions, strict=True):
        stream = client.completions.create(
            model="demo", prompt=["a photo of"], extra_body={"image": url}, stream=True
        )
        assert "".join(chunk.choices[0].text for chunk in stream) == text


# -- langchain-openai ------------------------------------------------------------------------------


def langchain(app: App, kind: str = "ChatOpenAI", **more: Any) -> Any:
    module = importlib.import_module("langchain_openai")
    options = {"model": "demo", "base_url": f"{app.url}/v1", "api_key": "unused", "max_retries": 0}
    return getattr(module, kind)(**options, **more)


def test_langchain_openai_chat(demo: App, captions: list[str]) -> None:
    model = langchain(demo)
    assert [model.invoke(chat(url)).content for url in PICTURES] == captions


def test_langchain_openai_image_block(demo: App, captions: list[str]) -> None:
    """LangChain's own form of an image."""
    model = langchain(demo)
    for url, caption in zip(PICTURES, captions, strict=True):
        block = {"type": "image", "base64": url.partition(",")[2], "mime_type": "image/png"}
        assert model.invoke([{"role": "user", "content": [block]}]).content == caption


def test_langchain_openai_chat_streaming(demo: App, captions: list[str]) -> None:
    model = langchain(demo)
    counts = []
    for url, caption in zip(PICTURES, captions, strict=True):
        pieces = [chunk.content for chunk in model.stream(chat(url))]
        assert "".join(pieces) == caption
        counts.append(len(pieces))
    assert_in_pieces(counts)


async def test_langchain_openai_chat_async(demo: App, captions: list[str]) -> None:
    model = langchain(demo)
    for url, caption in zip(PICTURES, captions, strict=True):
        assert (await model.ainvoke(chat(url))).content == caption
        assert "".join([chunk.content async for chunk in model.astream(chat(url))]) == caption


def test_langchain_openai_responses(demo: App, captions: list[str]) -> None:
    model = langchain(demo, use_responses_api=True)
    assert [model.invoke(chat(url)).text for url in PICTURES] == captions


def test_langchain_openai_responses_streaming(demo: App, captions: list[str]) -> None:
    model = langchain(demo, use_responses_api=True)
    for url, caption in zip(PICTURES, captions, strict=True):
        assert "".join(chunk.text for chunk in model.stream(chat(url))) == caption


@pytest.mark.parametrize("responses", [False, True], ids=["chat", "responses"])
def test_langchain_openai_history(demo: App, responses: bool) -> None:
    model = langchain(demo, use_responses_api=responses)
    messages = chat(PICTURES[0], QUESTION)
    messages += [model.invoke(messages), {"role": "user", "content": "what color is it?"}]
    plain = chat(PICTURES[0], QUESTION)
    plain += [
        {"role": "assistant", "content": messages[1].text},
        {"role": "user", "content": "what color is it?"},
    ]
    answer = demo.post("/v1/chat/completions", json={"messages": plain}).json()

    assert model.invoke(messages).text == answer["choices"][0]["message"]["content"]


def test_langchain_openai_completions(demo: App, completions: list[str]) -> None:
    for url, text in zip(PICTURES, completions, strict=True):
        model = langchain(demo, "OpenAI", temperature=0, extra_body={"image": url})
        assert model.invoke("a photo of") == text
        assert "".join(model.stream("a photo of")) == text


# -- litellm ---------------------------------------------------------------------------------------


@pytest.fixture
def litellm() -> Any:
    """Imported late: at import, it looks for prices on the internet unless told not to."""
    return importlib.import_module("litellm")


def options(app: App, provider: str = "openai") -> dict[str, Any]:
    return {"model": f"{provider}/demo", "api_base": f"{app.url}/v1", "api_key": "unused"}


def test_litellm_chat(demo: App, litellm: Any, captions: list[str]) -> None:
    answers = [litellm.completion(messages=chat(url), **options(demo)) for url in PICTURES]
    assert [answer.choices[0].message.content for answer in answers] == captions


def test_litellm_chat_streaming(demo: App, litellm: Any, captions: list[str]) -> None:
    counts = []
    for url, caption in zip(PICTURES, captions, strict=True):
        stream = litellm.completion(messages=chat(url), stream=True, **options(demo))
        pieces = [chunk.choices[0].delta.content or "" for chunk in stream]
        assert "".join(pieces) == caption
        counts.append(len(pieces))
    assert_in_pieces(counts)


async def test_litellm_chat_async(demo: App, litellm: Any, captions: list[str]) -> None:
    for url, caption in zip(PICTURES, captions, strict=True):
        answer = await litellm.acompletion(messages=chat(url), **options(demo))
        assert answer.choices[0].message.content == caption


def test_litellm_responses(demo: App, litellm: Any, captions: list[str]) -> None:
    for url, caption in zip(PICTURES, captions, strict=True):
        answer = litellm.responses(input=response_input(url), **options(demo))
        assert answer.output[0].content[0].text == caption


def test_litellm_responses_streaming(demo: App, litellm: Any, captions: list[str]) -> None:
    for url, caption in zip(PICTURES, captions, strict=True):
        stream = litellm.responses(input=response_input(url), stream=True, **options(demo))
        deltas = [event.delta for event in stream if event.type == "response.output_text.delta"]
        assert "".join(deltas) == caption


def test_litellm_completions(demo: App, litellm: Any, completions: list[str]) -> None:
    for url, text in zip(PICTURES, completions, strict=True):
        answer = litellm.text_completion(
            prompt="a photo of",
            extra_body={"image": url},
            **options(demo, "text-completion-openai"),
        )
        assert answer.choices[0].text == text
