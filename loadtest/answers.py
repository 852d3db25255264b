"""Whether an answer is right. A wrong answer is a failure, however fast it came."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

DONE = object()  # the end of a stream
REFUSALS = (429, 503)  # statuses of a server that has no room now


class WrongAnswer(Exception):
    """The message says what is wrong with the answer."""


@dataclass(frozen=True)
class Expected:
    """What is known about an answer in advance."""

    max_tokens: int
    exactly: bool = False  # exactly `max_tokens` tokens, and any text
    words: str | None = None  # None: any words


def event(line: bytes) -> Any:
    """The JSON of one line of server-sent events, DONE, or None for a line without data.

    Raises:
        WrongAnswer: the event is an error.
    """
    field, _, data = line.partition(b":")
    if field != b"data":
        return None  # a blank line ends an event; one that starts with a colon is a comment
    if data.strip() == b"[DONE]":
        return DONE
    found = json.loads(data)
    if "error" in found:
        raise WrongAnswer(f"an error in the stream: {found['error']}")
    return found


def piece(answer: Any, part: str) -> str:
    """The text in the "message" of a body, or in the "delta" of an event."""
    return "".join(choice.get(part, {}).get("content") or "" for choice in answer["choices"])


def ok(status: int, body: bytes) -> None:
    """Raises WrongAnswer unless the status is 200."""
    if status != 200:
        raise WrongAnswer(f"status {status}: {cut(body.decode(errors='replace'))}")


def text(answer: str, tokens: int, expected: Expected) -> None:
    """Raises WrongAnswer unless text and token count are as expected."""
    if tokens > expected.max_tokens or (expected.exactly and tokens != expected.max_tokens):
        raise WrongAnswer(f"{tokens} tokens instead of {expected.max_tokens}")
    if not answer.strip() and not expected.exactly:
        raise WrongAnswer("no text")
    if expected.words is not None and answer.strip() != expected.words:
        raise WrongAnswer(f"{cut(answer.strip())!r} is not {expected.words!r}")


def caption(body: Any, expected: Expected) -> int:
    """Returns the token count of a "caption.list" with one caption, or raises WrongAnswer."""
    try:
        (item,) = body["data"]
        answer, tokens = item["caption"], body["usage"]["completion_tokens"]
    except (LookupError, TypeError, ValueError):
        raise WrongAnswer(f"no caption in {cut(body)}") from None
    text(answer, tokens, expected)
    return int(tokens)


def chat(body: Any, expected: Expected) -> int:
    """Returns the token count of a chat completion with one choice, or raises WrongAnswer."""
    try:
        (choice,) = body["choices"]
        answer, tokens = choice["message"]["content"], body["usage"]["completion_tokens"]
    except (LookupError, TypeError, ValueError):
        raise WrongAnswer(f"no choice in {cut(body)}") from None
    text(answer, tokens, expected)
    return int(tokens)


def refusal(status: int, body: Any) -> None:
    """Raises WrongAnswer unless this is a 4xx with an error in OpenAI's shape."""
    try:
        complete = bool(body["error"]["message"]) and body["error"].keys() >= {"type", "code"}
    except (LookupError, TypeError, AttributeError):
        complete = False
    if not 400 <= status < 500:
        raise WrongAnswer(f"status {status} for a bad request: {cut(body)}")
    if not complete:
        raise WrongAnswer(f"an error without message, type and code: {cut(body)}")


def cut(value: object) -> str:
    """Its first 300 characters."""
    return str(value)[:300]
