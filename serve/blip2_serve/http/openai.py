"""Answers as OpenAI's objects: one JSON body, or server-sent events of chunks."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import replace
from typing import Any

from blip2_serve.errors import Blip2ServeError
from blip2_serve.types import Completion, TokenEvent, TokenLogprob

Json = dict[str, Any]


def usage(prompt_tokens: int, completion_tokens: int) -> Json:
    """Token counts; the image's positions count as prompt tokens."""
    return {
        "prompt_tokens": prompt_tokens,
        "completion_tokens": completion_tokens,
        "total_tokens": prompt_tokens + completion_tokens,
    }


class ChatShape:
    """`chat.completion` and its chunks. Text comes without white space around it."""

    id_prefix = "chatcmpl-"
    object, chunk_object = "chat.completion", "chat.completion.chunk"
    strip = True

    @staticmethod
    def first_chunk() -> Json | None:
        return {"delta": {"role": "assistant", "content": ""}}

    @staticmethod
    def whole(text: str) -> Json:
        return {"message": {"role": "assistant", "content": text, "refusal": None}}

    @staticmethod
    def delta(text: str) -> Json:
        return {"delta": {"content": text} if text else {}}

    @staticmethod
    def logprobs(logprobs: Sequence[TokenLogprob], _: int) -> Json:
        content = [
            {**_token(entry), "top_logprobs": [_token(other) for other in entry.top]}
            for entry in logprobs
        ]
        return {"content": content, "refusal": None}


class TextShape:
    """`text_completion`, whole and in chunks. Text comes exactly as generated."""

    id_prefix = "cmpl-"
    object, chunk_object = "text_completion", "text_completion"
    strip = False

    @staticmethod
    def first_chunk() -> Json | None:
        return None

    @staticmethod
    def whole(text: str) -> Json:
        return {"text": text}

    delta = whole

    @staticmethod
    def logprobs(logprobs: Sequence[TokenLogprob], offset: int) -> Json:
        """`offset`: characters of the tokens before."""
        texts = [_text(entry) for entry in logprobs]
        return {
            "tokens": texts,
            "token_logprobs": [entry.logprob for entry in logprobs],
            "top_logprobs": [{_text(o): o.logprob for o in entry.top} for entry in logprobs],
            "text_offset": [offset + sum(map(len, texts[:i])) for i in range(len(texts))],
        }


Shape = type[ChatShape] | type[TextShape]


def body(shape: Shape, head: Json, completion: Completion, return_token_ids: bool) -> Json:
    """The answer to a request without `stream`. `head` has id, created and model."""
    choices = []
    for index, answer in enumerate(completion.choices):
        text = answer.text.strip() if shape.strip else answer.text
        logprobs = shape.logprobs(answer.logprobs, 0) if answer.logprobs else None
        choice = _choice(index, shape.whole(text), logprobs, answer.finish_reason)
        if return_token_ids:
            choice["token_ids"] = answer.token_ids
        choices.append(choice)
    return {
        **head,
        "object": shape.object,
        "choices": choices,
        "usage": usage(completion.prompt_tokens, completion.completion_tokens),
    }


async def chunks(
    shape: Shape,
    head: Json,
    events: AsyncIterator[TokenEvent],
    *,
    return_token_ids: bool,
    include_usage: bool,
    report: Callable[[Exception], Blip2ServeError],
) -> AsyncIterator[bytes]:
    """The answer to a request with `stream`, as server-sent events up to [DONE].

    An error after the first event can no longer be a status: it is sent as an event, made by
    `report`, and ends the stream.
    """
    head = {**head, "object": shape.chunk_object}

    def chunk(choices: list[Json], **more: Any) -> bytes:
        # With include_usage, OpenAI sends `usage: null` on all chunks but the last.
        total = {"usage": None} if include_usage else {}
        return _event({**head, "choices": choices, **total, **more})

    prompt = completion = 0
    offsets: dict[int, int] = {}  # by answer: characters of its tokens so far
    try:
        async for event in stripped(events) if shape.strip else events:
            prompt = event.prompt_tokens
            completion += len(event.token_ids)
            if event.index not in offsets:
                offsets[event.index] = 0
                if first := shape.first_chunk():
                    yield chunk([_choice(event.index, first, None, None)])
            if event.text or event.finish_reason or event.logprobs or return_token_ids:
                logprobs = None
                if event.logprobs:
                    logprobs = shape.logprobs(event.logprobs, offsets[event.index])
                    offsets[event.index] += sum(len(_text(e)) for e in event.logprobs)
                delta = shape.delta(event.text)
                choice = _choice(event.index, delta, logprobs, event.finish_reason)
                if return_token_ids:
                    choice["token_ids"] = event.token_ids
                yield chunk([choice])
    except Exception as error:
        yield _event(report(error).body())
        return
    if include_usage:
        yield chunk([], usage=usage(prompt, completion))
    yield b"data: [DONE]\n\n"


async def stripped(events: AsyncIterator[TokenEvent]) -> AsyncIterator[TokenEvent]:
    """The same events without white space at the start and the end of each whole text."""
    held: dict[int, str | None] = {}  # by answer: white space at its end; None at its start
    async for event in events:
        before = held.get(event.index)
        text = event.text.lstrip() if before is None else before + event.text
        sure = text.rstrip()
        held[event.index] = text[len(sure) :] if text or before is not None else None
        yield replace(event, text=sure)


def _choice(index: int, content: Json, logprobs: Json | None, finish_reason: str | None) -> Json:
    return {"index": index, **content, "logprobs": logprobs, "finish_reason": finish_reason}


def _token(entry: TokenLogprob) -> Json:
    return {"token": _text(entry), "logprob": entry.logprob, "bytes": list(entry.token)}


def _text(entry: TokenLogprob) -> str:
    return entry.token.decode(errors="replace")


def _event(data: Json) -> bytes:
    return (
        b"data: " + json.dumps(data, ensure_ascii=False, separators=(",", ":")).encode() + b"\n\n"
    )
