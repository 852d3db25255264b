"""Whether an answer is right. A wrong answer is a failure, not a fast success."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


class WrongAnswer(Exception):
    """What is wrong with it."""


@dataclass(frozen=True)
class Expected:
    """What is known of an answer before it comes."""

    max_tokens: int
    exactly: bool = False  # so many tokens, no fewer
    words: str | None = None  # None: any


def ok(status: int, body: bytes) -> None:
    """Raises WrongAnswer unless the status is 200."""
    if status != 200:
        raise WrongAnswer(f"status {status}: {_cut(body.decode(errors='replace'))}")


def text(answer: str, tokens: int, expected: Expected) -> None:
    """Raises WrongAnswer unless text and token count are as expected."""
    if tokens > expected.max_tokens or (expected.exactly and tokens != expected.max_tokens):
        raise WrongAnswer(f"{tokens} tokens, {expected.max_tokens} were asked for")
    if not answer.strip() and not expected.exactly:
        raise WrongAnswer("no text")
    if expected.words is not None and answer.strip() != expected.words:
        raise WrongAnswer(f"{_cut(answer.strip())!r} is not {expected.words!r}")


def caption(body: Any, expected: Expected) -> int:
    """Tokens of the one caption of a "caption.list".

    Raises:
        WrongAnswer
    """
    try:
        (item,) = body["data"]
        answer, tokens = item["caption"], body["usage"]["completion_tokens"]
    except (LookupError, TypeError, ValueError):
        raise WrongAnswer(f"no caption in {_cut(body)}") from None
    text(answer, tokens, expected)
    return int(tokens)


def chat(body: Any, expected: Expected) -> tuple[str, int]:
    """Text and tokens of a chat completion with one choice.

    Raises:
        WrongAnswer
    """
    try:
        (choice,) = body["choices"]
        answer, tokens = choice["message"]["content"], body["usage"]["completion_tokens"]
    except (LookupError, TypeError, ValueError):
        raise WrongAnswer(f"no choice in {_cut(body)}") from None
    text(answer, tokens, expected)
    return str(answer), int(tokens)


def refusal(status: int, body: Any) -> None:
    """Raises WrongAnswer unless this is a 4xx with an error in OpenAI's shape."""
    try:
        complete = bool(body["error"]["message"]) and body["error"].keys() >= {"type", "code"}
    except (LookupError, TypeError, AttributeError):
        complete = False
    if not 400 <= status < 500:
        raise WrongAnswer(f"status {status} for a request that is wrong: {_cut(body)}")
    if not complete:
        raise WrongAnswer(f"an error without message, type and code: {_cut(body)}")


def _cut(value: object) -> str:
    return str(value)[:200]
