"""OpenAI's objects, and what a client can put together from streamed chunks."""

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

# Short pieces with much white space, where stripping could go wrong.
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
    """The pieces of some answers, and the order in which they come, by number of the answer."""
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


def writer(shape: openai.Shape, *include: str, return_token_ids: bool = False) -> openai.Writer:
    return openai.Writer(shape, "demo", return_token_ids=return_token_ids, include=include)


async def chunks_of(
    shape: openai.Shape,
    events: AsyncIterator[TokenEvent],
    *include: str,
    return_token_ids: bool = False,
) -> list[Any]:
    made = writer(shape, *include, return_token_ids=return_token_ids)
    sent = [chunk async for chunk in made.events(events, as_unavailable)]
    assert all(c.startswith(b"data: ") and c.endswith(b"\n\n") for c in sent)
    payloads = [c.removeprefix(b"data: ").removesuffix(b"\n\n") for c in sent]
    assert not any(b"\n" in p or b"\r" in p for p in payloads)
    return ["[DONE]" if p == b"[DONE]" else json.loads(p) for p in payloads]


@settings(deadline=None, database=None)
@given(PIECES)
def test_a_text_is_stripped_however_it_is_cut_into_pieces(pieces: list[str]) -> None:
    stripper = openai.Stripper()

    assert "".join(map(stripper.push, pieces)) == "".join(pieces).strip()


@settings(deadline=None, database=None)
@given(several_answers())
def test_streamed_token_ids_are_complete_and_in_order(
    case: tuple[list[list[str]], list[int]],
) -> None:
    answers, order = case

    sent = asyncio.run(
        chunks_of(openai.ChatShape, interleaved(answers, order), return_token_ids=True)
    )
    choices = [chunk["choices"][0] for chunk in sent[:-1]]
    with_ids = [choice for choice in choices if "token_ids" in choice]
    assert [choice["index"] for choice in with_ids] == order
    assert [choice["token_ids"] for choice in with_ids] == [[i] for i in range(len(order))]


@settings(deadline=None, database=None)
@given(several_answers())
def test_joined_deltas_are_the_whole_answers(
    case: tuple[list[list[str]], list[int]],
) -> None:
    answers, order = case

    chat = asyncio.run(chunks_of(openai.ChatShape, interleaved(answers, order)))
    whole = writer(openai.ChatShape).body(completion(answers))
    joined = joined_by_choice(chat, lambda choice: choice["delta"].get("content", ""))
    assert joined == {c["index"]: c["message"]["content"] for c in whole["choices"]}

    text = asyncio.run(chunks_of(openai.TextShape, interleaved(answers, order)))
    whole = writer(openai.TextShape).body(completion(answers))
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
def test_each_choice_starts_with_its_role_and_ends_with_its_finish_reason(
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
        pytest.param(["a"], id="one piece"),
        pytest.param(["a", ""], id="the last piece is empty"),
        pytest.param(["", " "], id="no text at all"),
    ],
)
async def test_the_only_finish_reason_comes_last(shape: openai.Shape, pieces: list[str]) -> None:
    *sent, done = await chunks_of(shape, replay(pieces))

    reasons = [chunk["choices"][0]["finish_reason"] for chunk in sent]
    assert done == "[DONE]"
    assert reasons.pop() == "length"
    assert set(reasons) <= {None}


async def test_usage_counts_tokens_without_text_too() -> None:
    sent = await chunks_of(openai.ChatShape, replay(["a", "", " ", "b"]), "usage")

    assert sent[-2]["usage"] == {"prompt_tokens": 4, "completion_tokens": 4, "total_tokens": 8}
    assert sent[-2]["choices"] == []


async def test_usage_counts_the_tokens_of_all_choices() -> None:
    events = interleaved([["a", "b"], ["c"], ["d"]], [0, 2, 1, 0])
    sent = await chunks_of(openai.TextShape, events, "usage")
    whole = Completion(
        (Choice((1, 2), "ab", "stop"), Choice((3,), "c", "stop"), Choice((4,), "d", "stop")), 4
    )
    body = writer(openai.TextShape).body(whole)

    assert sent[-2]["usage"] == body["usage"]
    assert body["usage"] == {"prompt_tokens": 4, "completion_tokens": 4, "total_tokens": 8}


async def test_token_ids_are_sent_even_if_they_make_no_text_yet() -> None:
    sent = await chunks_of(openai.TextShape, replay(["", "é"]), return_token_ids=True)

    assert [c["choices"][0]["token_ids"] for c in sent[:-1]] == [[0], [1]]


@pytest.mark.parametrize("shape", [openai.ChatShape, openai.TextShape])
async def test_after_an_error_there_is_no_done_and_no_usage(shape: openai.Shape) -> None:
    sent = await chunks_of(shape, replay(["a", "b"], KeyError("secret")), "usage")

    assert sent[-1] == Unavailable("lost").body()
    assert "[DONE]" not in sent
    assert all(chunk.get("usage") is None for chunk in sent)


async def test_line_breaks_and_text_beyond_ascii_survive_the_transport() -> None:
    text = 'a\r\nb "ü" 🙂 data: \n\nc'
    sent = await chunks_of(openai.TextShape, replay([text]))

    assert sent[0]["choices"][0]["text"] == text


# -- log-probabilities -----------------------------------------------------------------------------

EURO = "€".encode()
# " a", the first byte of a euro sign and the rest of it, with likely alternatives.
LOGPROBS = (
    TokenLogprob(5, -0.5, b" a", (TokenLogprob(5, -0.5, b" a"), TokenLogprob(6, -1.5, b"\n"))),
    TokenLogprob(7, -0.25, EURO[:1], (TokenLogprob(7, -0.25, EURO[:1]),)),
    TokenLogprob(8, -0.125, EURO[1:]),
)


async def with_logprobs(*sizes: int) -> AsyncIterator[TokenEvent]:
    """The tokens above, in events of these numbers of tokens."""
    texts = [" a", "", "€"]
    at = 0
    for size in sizes:
        end = at + size
        ids = tuple(logprob.token_id for logprob in LOGPROBS[at:end])
        reason = "length" if end == len(LOGPROBS) else None
        yield TokenEvent(ids, "".join(texts[at:end]), reason, 4, 0, LOGPROBS[at:end])  # type: ignore[arg-type]
        at = end


WHOLE = Completion((Choice((5, 7, 8), " a€", "length", LOGPROBS),), 4)


def test_log_probabilities_of_a_chat_have_openais_shape() -> None:
    choice = writer(openai.ChatShape).body(WHOLE)["choices"][0]

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


def test_log_probabilities_of_a_text_have_the_shape_of_openais_completions() -> None:
    choice = writer(openai.TextShape).body(WHOLE)["choices"][0]

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
    whole = writer(openai.ChatShape).body(WHOLE)["choices"][0]
    sent = await chunks_of(openai.ChatShape, with_logprobs(*sizes))
    parts = [c["choices"][0]["logprobs"] for c in sent[:-1]]
    assert [token for part in parts if part for token in part["content"]] == whole["logprobs"][
        "content"
    ]

    whole = writer(openai.TextShape).body(WHOLE)["choices"][0]
    sent = await chunks_of(openai.TextShape, with_logprobs(*sizes))
    parts = [c["choices"][0]["logprobs"] for c in sent[:-1]]
    assert {key: [value for part in parts for value in part[key]] for key in parts[0]} == whole[
        "logprobs"
    ]


async def test_text_offsets_are_counted_by_choice() -> None:
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
async def test_the_field_is_null_without_log_probabilities(shape: openai.Shape) -> None:
    whole = writer(shape).body(completion([["a"]]))
    sent = await chunks_of(shape, replay(["a", "b"]))

    assert whole["choices"][0]["logprobs"] is None
    assert all(chunk["choices"][0]["logprobs"] is None for chunk in sent[:-1])
