"""Answers as OpenAI's objects: one JSON body, or server-sent events of chunks."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Callable
from dataclasses import replace
from typing import Any

from blip2_serve.errors import Blip2ServeError
from blip2_serve.types import Completion, TokenEvent

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


Shape = type[ChatShape] | type[TextShape]


def body(shape: Shape, head: Json, completion: Completion, return_token_ids: bool) -> Json:
    """The answer to a request without `stream`. `head` has id, created and model."""
    text = completion.text.strip() if shape.strip else completion.text
    choice = _choice(shape.whole(text), completion.finish_reason)
    if return_token_ids:
        choice["token_ids"] = completion.token_ids
    return {
        **head,
        "object": shape.object,
        "choices": [choice],
        "usage": usage(completion.prompt_tokens, len(completion.token_ids)),
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

    if first := shape.first_chunk():
        yield chunk([_choice(first, None)])
    prompt = completion = 0
    try:
        async for event in stripped(events) if shape.strip else events:
            prompt = event.prompt_tokens
            completion += len(event.token_ids)
            if event.text or event.finish_reason or return_token_ids:
                choice = _choice(shape.delta(event.text), event.finish_reason)
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
    """The same events without white space at the start and the end of the whole text."""
    started = False
    held = ""
    async for event in events:
        text = held + event.text
        if not started:
            text = text.lstrip()
        started = started or bool(text)
        sure = text.rstrip()
        held = text[len(sure) :]
        yield replace(event, text=sure)


def _choice(content: Json, finish_reason: str | None) -> Json:
    return {"index": 0, **content, "logprobs": None, "finish_reason": finish_reason}


def _event(data: Json) -> bytes:
    return (
        b"data: " + json.dumps(data, ensure_ascii=False, separators=(",", ":")).encode() + b"\n\n"
    )
