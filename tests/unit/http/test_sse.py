"""Server-sent events: what a client can put together from them."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Sequence
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from blip2_serve.errors import Blip2ServeError, Unavailable
from blip2_serve.http import sse
from blip2_serve.types import Completion, TokenEvent

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


def as_unavailable(_: Exception) -> Blip2ServeError:
    return Unavailable("lost")


async def chunks_of(
    shape: sse.Shape, events: AsyncIterator[TokenEvent], **options: bool
) -> list[Any]:
    wanted = {"return_token_ids": False, "include_usage": False, **options}
    sent = [c async for c in sse.chunks(shape, HEAD, events, report=as_unavailable, **wanted)]
    assert all(c.startswith(b"data: ") and c.endswith(b"\n\n") for c in sent)
    payloads = [c.removeprefix(b"data: ").removesuffix(b"\n\n") for c in sent]
    assert not any(b"\n" in p or b"\r" in p for p in payloads)
    return ["[DONE]" if p == b"[DONE]" else json.loads(p) for p in payloads]


@settings(deadline=None, database=None)
@given(PIECES)
def test_stripped_events_make_the_stripped_text_whatever_the_pieces(pieces: list[str]) -> None:
    async def collect() -> list[TokenEvent]:
        return [event async for event in sse.stripped(replay(pieces))]

    events = asyncio.run(collect())
    assert "".join(event.text for event in events) == "".join(pieces).strip()
    assert [event.token_ids for event in events] == [(i,) for i in range(len(pieces))]
    assert all(event.finish_reason == "length" for event in events[-1:])


@settings(deadline=None, database=None)
@given(PIECES.filter(bool))
def test_a_client_that_joins_the_deltas_has_the_whole_answer(pieces: list[str]) -> None:
    whole = Completion(tuple(range(len(pieces))), "".join(pieces), "length", 4)

    chat = asyncio.run(chunks_of(sse.ChatShape, replay(pieces)))
    joined = "".join(c["choices"][0]["delta"].get("content", "") for c in chat[:-1])
    body = sse.body(sse.ChatShape, HEAD, whole, return_token_ids=False)
    assert joined == body["choices"][0]["message"]["content"]

    text = asyncio.run(chunks_of(sse.TextShape, replay(pieces)))
    joined = "".join(c["choices"][0]["text"] for c in text[:-1])
    body = sse.body(sse.TextShape, HEAD, whole, return_token_ids=False)
    assert joined == body["choices"][0]["text"]


@pytest.mark.parametrize("shape", [sse.ChatShape, sse.TextShape])
@pytest.mark.parametrize(
    "pieces",
    [
        pytest.param(["a"], id="all at once"),
        pytest.param(["a", ""], id="an end without text"),
        pytest.param(["", " "], id="no text at all"),
    ],
)
async def test_a_stream_has_one_finish_reason_and_it_comes_last(
    shape: sse.Shape, pieces: list[str]
) -> None:
    *sent, done = await chunks_of(shape, replay(pieces))

    reasons = [chunk["choices"][0]["finish_reason"] for chunk in sent]
    assert done == "[DONE]"
    assert reasons.pop() == "length"
    assert set(reasons) <= {None}


async def test_usage_counts_every_token_those_without_text_included() -> None:
    sent = await chunks_of(sse.ChatShape, replay(["a", "", " ", "b"]), include_usage=True)

    assert sent[-2]["usage"] == {"prompt_tokens": 4, "completion_tokens": 4, "total_tokens": 8}
    assert sent[-2]["choices"] == []


async def test_token_ids_are_sent_even_where_they_make_no_text_yet() -> None:
    sent = await chunks_of(sse.TextShape, replay(["", "é"]), return_token_ids=True)

    assert [c["choices"][0]["token_ids"] for c in sent[:-1]] == [[0], [1]]


@pytest.mark.parametrize("shape", [sse.ChatShape, sse.TextShape])
async def test_an_error_ends_the_stream_without_done_and_without_usage(shape: sse.Shape) -> None:
    sent = await chunks_of(shape, replay(["a", "b"], KeyError("secret")), include_usage=True)

    assert sent[-1] == Unavailable("lost").body()
    assert "[DONE]" not in sent
    assert all(chunk.get("usage") is None for chunk in sent)


async def test_text_beyond_ascii_and_line_breaks_survive_the_transport() -> None:
    text = 'a\r\nb "ü" 🙂 data: \n\nc'
    sent = await chunks_of(sse.TextShape, replay([text]))

    assert sent[0]["choices"][0]["text"] == text
