"""Server-sent events: what a client can put together from them."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Callable, Sequence
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from blip2_serve.errors import Blip2ServeError, Unavailable
from blip2_serve.http import openai
from blip2_serve.types import Choice, Completion, TokenEvent, TokenLogprob

HEAD = {"id": "x-1", "created": 1, "model": "demo"}

# Short pieces with much white space: where stripping could go wrong.
PIECES = st.lists(st.text(alphabet="ab \n\t\u00a0\u2003é", max_size=4), max_size=8)


async def replay(
    pieces: Sequence[str], failure: Exception | None = None
) -> AsyncIterator[TokenEvent]:
    for i, piece in enumerate(pieces):
        last = failure is None and i == len(pieces) - 1
        yield TokenEvent((i,), piece, "length" if last else None, 4)
    if failure is not None:
        raise failure


@st.composite
def several_answers(draw: st.DrawFn) -> tuple[list[list[str]], list[int]]:
    """The pieces of some answers, and the order in which they come: a list of answers' numbers."""
    answers = draw(st.lists(PIECES.filter(bool), min_size=1, max_size=4))
    order = [index for index, pieces in enumerate(answers) for _ in pieces]
    return answers, draw(st.permutations(order))


async def interleaved(
    answers: Sequence[Sequence[str]], order: Sequence[int]
) -> AsyncIterator[TokenEvent]:
    next_piece = [0] * len(answers)
    for i, index in enumerate(order):
        piece = answers[index][next_piece[index]]
        next_piece[index] += 1
        ended = next_piece[index] == len(answers[index])
        last = i == len(order) - 1
        yield TokenEvent((i,), piece, "stop" if ended else None, 4, index, last=last)


def completion(answers: Sequence[Sequence[str]]) -> Completion:
    return Completion(tuple(Choice((1,), "".join(pieces), "stop") for pieces in answers), 4)


def as_unavailable(_: Exception) -> Blip2ServeError:
    return Unavailable("lost")


async def chunks_of(
    shape: openai.Shape, events: AsyncIterator[TokenEvent], **options: bool
) -> list[Any]:
    wanted = {"return_token_ids": False, "include_usage": False, **options}
    sent = [c async for c in openai.chunks(shape, HEAD, events, report=as_unavailable, **wanted)]
    assert all(c.startswith(b"data: ") and c.endswith(b"\n\n") for c in sent)
    payloads = [c.removeprefix(b"data: ").removesuffix(b"\n\n") for c in sent]
    assert not any(b"\n" in p or b"\r" in p for p in payloads)
    return ["[DONE]" if p == b"[DONE]" else json.loads(p) for p in payloads]


@settings(deadline=None, database=None)
@given(PIECES)
def test_stripped_events_make_the_stripped_text_whatever_the_pieces(pieces: list[str]) -> None:
    async def collect() -> list[TokenEvent]:
        return [event async for event in openai.stripped(replay(pieces))]

    events = asyncio.run(collect())
    assert "".join(event.text for event in events) == "".join(pieces).strip()
    assert [event.token_ids for event in events] == [(i,) for i in range(len(pieces))]
    assert all(event.finish_reason == "length" for event in events[-1:])


@settings(deadline=None, database=None)
@given(several_answers())
def test_each_of_several_answers_is_stripped_on_its_own(
    case: tuple[list[list[str]], list[int]],
) -> None:
    answers, order = case

    async def collect() -> list[TokenEvent]:
        return [event async for event in openai.stripped(interleaved(answers, order))]

    events = asyncio.run(collect())
    assert [event.index for event in events] == order
    for index, pieces in enumerate(answers):
        text = "".join(event.text for event in events if event.index == index)
        assert text == "".join(pieces).strip()


@settings(deadline=None, database=None)
@given(several_answers())
def test_a_client_that_joins_the_deltas_has_the_whole_answers(
    case: tuple[list[list[str]], list[int]],
) -> None:
    answers, order = case

    chat = asyncio.run(chunks_of(openai.ChatShape, interleaved(answers, order)))
    whole = openai.body(openai.ChatShape, HEAD, completion(answers), return_token_ids=False)
    joined = joined_by_choice(chat, lambda choice: choice["delta"].get("content", ""))
    assert joined == {c["index"]: c["message"]["content"] for c in whole["choices"]}

    text = asyncio.run(chunks_of(openai.TextShape, interleaved(answers, order)))
    whole = openai.body(openai.TextShape, HEAD, completion(answers), return_token_ids=False)
    joined = joined_by_choice(text, lambda choice: choice["text"])
    assert joined == {c["index"]: c["text"] for c in whole["choices"]}


def joined_by_choice(chunks: list[Any], text: Callable[[Any], str]) -> dict[int, str]:
    joined: dict[int, str] = {}
    for chunk in chunks[:-1]:
        (choice,) = chunk["choices"]
        joined[choice["index"]] = joined.get(choice["index"], "") + text(choice)
    return joined


@settings(deadline=None, database=None)
@given(several_answers())
def test_each_choice_of_a_chat_begins_with_its_role_and_ends_with_its_finish_reason(
    case: tuple[list[list[str]], list[int]],
) -> None:
    answers, order = case
    sent = asyncio.run(chunks_of(openai.ChatShape, interleaved(answers, order)))
    for index in range(len(answers)):
        choices = [c["choices"][0] for c in sent[:-1] if c["choices"][0]["index"] == index]
        roles = [choice["delta"].get("role") for choice in choices]
        assert roles == ["assistant"] + [None] * (len(choices) - 1)
        reasons = [choice["finish_reason"] for choice in choices]
        assert reasons == [None] * (len(choices) - 1) + ["stop"]


@pytest.mark.parametrize("shape", [openai.ChatShape, openai.TextShape])
@pytest.mark.parametrize(
    "pieces",
    [
        pytest.param(["a"], id="all at once"),
        pytest.param(["a", ""], id="an end without text"),
        pytest.param(["", " "], id="no text at all"),
    ],
)
async def test_a_stream_has_one_finish_reason_and_it_comes_last(
    shape: openai.Shape, pieces: list[str]
) -> None:
    *sent, done = await chunks_of(shape, replay(pieces))

    reasons = [chunk["choices"][0]["finish_reason"] for chunk in sent]
    assert done == "[DONE]"
    assert reasons.pop() == "length"
    assert set(reasons) <= {None}


async def test_usage_counts_every_token_those_without_text_included() -> None:
    sent = await chunks_of(openai.ChatShape, replay(["a", "", " ", "b"]), include_usage=True)

    assert sent[-2]["usage"] == {"prompt_tokens": 4, "completion_tokens": 4, "total_tokens": 8}
    assert sent[-2]["choices"] == []


async def test_usage_counts_the_tokens_of_every_answer() -> None:
    events = interleaved([["a", "b"], ["c"], ["d"]], [0, 2, 1, 0])
    sent = await chunks_of(openai.TextShape, events, include_usage=True)
    whole = Completion(
        (Choice((1, 2), "ab", "stop"), Choice((3,), "c", "stop"), Choice((4,), "d", "stop")), 4
    )
    body = openai.body(openai.TextShape, HEAD, whole, return_token_ids=False)

    assert sent[-2]["usage"] == body["usage"]
    assert body["usage"] == {"prompt_tokens": 4, "completion_tokens": 4, "total_tokens": 8}


async def test_token_ids_are_sent_even_where_they_make_no_text_yet() -> None:
    sent = await chunks_of(openai.TextShape, replay(["", "é"]), return_token_ids=True)

    assert [c["choices"][0]["token_ids"] for c in sent[:-1]] == [[0], [1]]


@pytest.mark.parametrize("shape", [openai.ChatShape, openai.TextShape])
async def test_an_error_ends_the_stream_without_done_and_without_usage(shape: openai.Shape) -> None:
    sent = await chunks_of(shape, replay(["a", "b"], KeyError("secret")), include_usage=True)

    assert sent[-1] == Unavailable("lost").body()
    assert "[DONE]" not in sent
    assert all(chunk.get("usage") is None for chunk in sent)


async def test_text_beyond_ascii_and_line_breaks_survive_the_transport() -> None:
    text = 'a\r\nb "ü" 🙂 data: \n\nc'
    sent = await chunks_of(openai.TextShape, replay([text]))

    assert sent[0]["choices"][0]["text"] == text


# -- log-probabilities -----------------------------------------------------------------------------

EURO = "€".encode()
# " a", the first byte of a euro sign, and the rest of it, with what could have been instead.
LOGPROBS = (
    TokenLogprob(5, -0.5, b" a", (TokenLogprob(5, -0.5, b" a"), TokenLogprob(6, -1.5, b"\n"))),
    TokenLogprob(7, -0.25, EURO[:1], (TokenLogprob(7, -0.25, EURO[:1]),)),
    TokenLogprob(8, -0.125, EURO[1:]),
)


async def with_logprobs(*sizes: int) -> AsyncIterator[TokenEvent]:
    """The tokens above in events of so many tokens each."""
    texts = [" a", "", "€"]
    at = 0
    for size in sizes:
        end = at + size
        ids = tuple(logprob.token_id for logprob in LOGPROBS[at:end])
        reason = "length" if end == len(LOGPROBS) else None
        yield TokenEvent(ids, "".join(texts[at:end]), reason, 4, 0, LOGPROBS[at:end])  # type: ignore[arg-type]
        at = end


WHOLE = Completion((Choice((5, 7, 8), " a€", "length", LOGPROBS),), 4)


def test_a_chats_log_probabilities_are_openais() -> None:
    choice = openai.body(openai.ChatShape, HEAD, WHOLE, return_token_ids=False)["choices"][0]

    assert choice["logprobs"]["refusal"] is None
    assert choice["logprobs"]["content"] == [
        {
            "token": " a",
            "logprob": -0.5,
            "bytes": [32, 97],
            "top_logprobs": [
                {"token": " a", "logprob": -0.5, "bytes": [32, 97]},
                {"token": "\n", "logprob": -1.5, "bytes": [10]},
            ],
        },
        {
            "token": "\ufffd",
            "logprob": -0.25,
            "bytes": [226],
            "top_logprobs": [{"token": "\ufffd", "logprob": -0.25, "bytes": [226]}],
        },
        {"token": "\ufffd\ufffd", "logprob": -0.125, "bytes": [130, 172], "top_logprobs": []},
    ]
    joined = bytes(byte for token in choice["logprobs"]["content"] for byte in token["bytes"])
    assert joined.decode() == " a€"


def test_a_texts_log_probabilities_are_those_of_openais_completions() -> None:
    choice = openai.body(openai.TextShape, HEAD, WHOLE, return_token_ids=False)["choices"][0]

    logprobs = choice["logprobs"]
    assert logprobs.pop("text_offset")[:2] == [0, 2]
    assert logprobs == {
        "tokens": [" a", "\ufffd", "\ufffd\ufffd"],
        "token_logprobs": [-0.5, -0.25, -0.125],
        "top_logprobs": [{" a": -0.5, "\n": -1.5}, {"\ufffd": -0.25}, {}],
    }


@pytest.mark.parametrize("sizes", [(3,), (1, 1, 1), (1, 2), (2, 1)], ids=str)
async def test_streamed_log_probabilities_add_up_to_those_of_the_whole(
    sizes: tuple[int, ...],
) -> None:
    whole = openai.body(openai.ChatShape, HEAD, WHOLE, return_token_ids=False)["choices"][0]
    sent = await chunks_of(openai.ChatShape, with_logprobs(*sizes))
    parts = [c["choices"][0]["logprobs"] for c in sent[:-1]]
    assert [token for part in parts if part for token in part["content"]] == whole["logprobs"][
        "content"
    ]

    whole = openai.body(openai.TextShape, HEAD, WHOLE, return_token_ids=False)["choices"][0]
    sent = await chunks_of(openai.TextShape, with_logprobs(*sizes))
    parts = [c["choices"][0]["logprobs"] for c in sent[:-1]]
    assert {key: [value for part in parts for value in part[key]] for key in parts[0]} == whole[
        "logprobs"
    ]


async def test_text_offsets_of_several_answers_are_counted_apart() -> None:
    async def events() -> AsyncIterator[TokenEvent]:
        for i in range(4):
            logprobs = (TokenLogprob(i, -1.0, b"abc"),)
            yield TokenEvent((i,), "abc", "stop" if i > 1 else None, 4, i % 2, logprobs)

    sent = await chunks_of(openai.TextShape, events())
    choices = [c["choices"][0] for c in sent[:-1]]
    assert [(c["index"], c["logprobs"]["text_offset"]) for c in choices] == [
        (0, [0]),
        (1, [0]),
        (0, [3]),
        (1, [3]),
    ]


@pytest.mark.parametrize("shape", [openai.ChatShape, openai.TextShape])
async def test_without_log_probabilities_the_field_is_null(shape: openai.Shape) -> None:
    whole = openai.body(shape, HEAD, completion([["a"]]), return_token_ids=False)
    sent = await chunks_of(shape, replay(["a", "b"]))

    assert whole["choices"][0]["logprobs"] is None
    assert all(chunk["choices"][0]["logprobs"] is None for chunk in sent[:-1])
