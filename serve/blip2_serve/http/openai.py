"""Answers as OpenAI's objects: one JSON body, or server-sent events of chunks."""

from __future__ import annotations

import json
import re
import time
import uuid
from collections import defaultdict
from collections.abc import AsyncIterator, Callable, Collection, Sequence
from dataclasses import asdict, dataclass, field
from itertools import accumulate
from typing import Any

from blip2_serve.errors import Blip2ServeError
from blip2_serve.types import Completion, TokenEvent, TokenLogprob

Json = dict[str, Any]

# json.dumps would make an encoder for every chunk.
_encode = json.JSONEncoder(ensure_ascii=False, separators=(",", ":")).encode

# Many clients split events at whatever Unicode calls the end of a line. JSON escapes the others of
# these itself. Half a surrogate pair has no UTF-8.
_UNSAFE = re.compile("[\x85\u2028\u2029\ud800-\udfff]")


def usage(prompt_tokens: int, completion_tokens: int) -> Json:
    """Token counts; the image's positions count as prompt tokens."""
    return {
        "prompt_tokens": prompt_tokens,
        "completion_tokens": completion_tokens,
        "total_tokens": prompt_tokens + completion_tokens,
    }


class ChatShape:
    """`chat.completion` and its chunks, without white space around the text."""

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
    """`text_completion`, whole and in chunks, with the text exactly as generated."""

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
        """`offset`: number of characters in the tokens before these."""
        texts = [_text(entry) for entry in logprobs]
        *offsets, _ = accumulate(map(len, texts), initial=offset)
        return {
            "tokens": texts,
            "token_logprobs": [entry.logprob for entry in logprobs],
            "top_logprobs": [{_text(o): o.logprob for o in entry.top} for entry in logprobs],
            "text_offset": offsets,
        }


Shape = type[ChatShape] | type[TextShape]


class Stripper:
    """Strips a text that arrives in pieces; what it returns adds up to the stripped text."""

    def __init__(self) -> None:
        self._begun = False
        self._held = ""  # white space that is cut off if no text follows

    def push(self, piece: str) -> str:
        text = self._held + piece if self._begun else piece.lstrip()
        stripped = text.rstrip()
        self._begun = self._begun or bool(text)
        self._held = text[len(stripped) :]
        return stripped


@dataclass
class _Sent:
    """What a stream has sent of one choice."""

    characters: int = 0  # in the tokens with log-probabilities
    stripper: Stripper = field(default_factory=Stripper)


class Writer:
    """Writes the answer to one request."""

    def __init__(
        self,
        shape: Shape,
        model: str,
        *,
        return_token_ids: bool,
        include: Collection[str] = (),
    ) -> None:
        self._shape = shape
        self._head: Json = {
            "id": f"{shape.id_prefix}{uuid.uuid4().hex}",
            "created": int(time.time()),
            "model": model,
        }
        self._chunk_head: Json = {**self._head, "object": shape.chunk_object}
        self._return_token_ids = return_token_ids
        self._include = include

    def body(self, completion: Completion) -> Json:
        """The answer to a request without `stream`."""
        shape = self._shape
        choices = []
        for index, answer in enumerate(completion.choices):
            text = answer.text.strip() if shape.strip else answer.text
            logprobs = shape.logprobs(answer.logprobs, 0) if answer.logprobs else None
            choice = _choice(index, shape.whole(text), logprobs, answer.finish_reason)
            if self._return_token_ids:
                choice["token_ids"] = answer.token_ids
            choices.append(choice)
        return {
            **self._head,
            "object": shape.object,
            "choices": choices,
            "usage": usage(completion.prompt_tokens, completion.completion_tokens),
        }

    async def events(
        self,
        tokens: AsyncIterator[TokenEvent],
        report: Callable[[Exception], Blip2ServeError],
        timing: Callable[[], Json] = dict,
    ) -> AsyncIterator[bytes]:
        """The answer to a request with `stream`: server-sent events up to [DONE].

        An error can no longer set the status. It is sent as the last event instead, as `report`
        makes it. `timing` says at the end where the time has gone.
        """
        prompt_tokens = completion_tokens = 0
        sent: dict[int, _Sent] = defaultdict(_Sent)  # by choice
        try:
            async for event in tokens:
                prompt_tokens = event.prompt_tokens
                completion_tokens += len(event.token_ids)
                if event.resumed and "events" in self._include:
                    yield self._chunk([], {"event": {"type": "replica_replaced"}})
                if event.index not in sent and (first := self._shape.first_chunk()):
                    yield self._chunk([_choice(event.index, first, None, None)])
                if choice := self._delta(event, sent[event.index]):
                    yield self._chunk([choice])
                if event.beams and "beams" in self._include:
                    yield self._chunk([], {"beams": [asdict(beam) for beam in event.beams]})
        except Exception as error:
            yield event_of(report(error).body())
            return
        told: Json = {}
        if "usage" in self._include:
            told["usage"] = usage(prompt_tokens, completion_tokens)
        if "timing" in self._include:
            told["timing"] = timing()
        if told:
            yield self._chunk([], told)
        yield b"data: [DONE]\n\n"

    def _delta(self, event: TokenEvent, sent: _Sent) -> Json | None:
        """What `event` adds to its choice, if anything."""
        text = sent.stripper.push(event.text) if self._shape.strip else event.text
        tells_ids = self._return_token_ids and event.token_ids
        if not (text or event.finish_reason or event.logprobs or tells_ids):
            return None
        logprobs = None
        if event.logprobs:
            logprobs = self._shape.logprobs(event.logprobs, sent.characters)
            sent.characters += sum(len(_text(entry)) for entry in event.logprobs)
        choice = _choice(event.index, self._shape.delta(text), logprobs, event.finish_reason)
        if self._return_token_ids:
            choice["token_ids"] = event.token_ids
        return choice

    def _chunk(self, choices: list[Json], told: Json | None = None) -> bytes:
        chunk = {**self._chunk_head, "choices": choices}
        if "usage" in self._include:
            chunk["usage"] = None  # in all chunks but the last, as OpenAI has it
        return event_of({**chunk, **(told or {})})


def _choice(index: int, content: Json, logprobs: Json | None, finish_reason: str | None) -> Json:
    return {"index": index, **content, "logprobs": logprobs, "finish_reason": finish_reason}


def _token(entry: TokenLogprob) -> Json:
    return {"token": _text(entry), "logprob": entry.logprob, "bytes": list(entry.token)}


def _text(entry: TokenLogprob) -> str:
    return entry.token.decode(errors="replace")


def event_of(data: Json) -> bytes:
    """A server-sent event with `data` as JSON."""
    text = _encode(data)
    if not text.isascii():
        text = _UNSAFE.sub(lambda match: f"\\u{ord(match[0]):04x}", text)
    return b"data: " + text.encode() + b"\n\n"
