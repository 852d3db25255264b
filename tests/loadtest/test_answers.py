"""Right answers pass the checks, wrong ones are explained."""

from __future__ import annotations

from typing import Any

import pytest

from loadtest import answers
from loadtest.answers import Expected, WrongAnswer


def caption(text: str, tokens: int) -> dict[str, Any]:
    return {"data": [{"index": 0, "caption": text}], "usage": {"completion_tokens": tokens}}


def chat(text: str, tokens: int) -> dict[str, Any]:
    return {"choices": [{"message": {"content": text}}], "usage": {"completion_tokens": tokens}}


def test_right_answers_return_their_token_count() -> None:
    assert answers.caption(caption("a circle", 3), Expected(40, words="a circle")) == 3
    assert answers.chat(chat(" red ", 2), Expected(2, exactly=True, words="red")) == 2


@pytest.mark.parametrize(
    ("body", "expected", "why"),
    [
        pytest.param(caption("a circle", 41), Expected(40), "41 tokens", id="too many tokens"),
        pytest.param(
            caption("a circle", 39),
            Expected(40, exactly=True),
            "39 tokens",
            id="too few tokens",
        ),
        pytest.param(caption(" ", 3), Expected(40), "no text", id="no text"),
        pytest.param(
            caption("a square", 3),
            Expected(40, words="a circle"),
            "is not 'a circle'",
            id="wrong",
        ),
        pytest.param({"error": {}}, Expected(40), "no caption", id="an error as body"),
        pytest.param({"data": [{"error": 1}]}, Expected(40), "no caption", id="a failed caption"),
        pytest.param([], Expected(40), "no caption", id="not an object"),
    ],
)
def test_a_wrong_caption_says_what_is_wrong(body: Any, expected: Expected, why: str) -> None:
    with pytest.raises(WrongAnswer, match=why):
        answers.caption(body, expected)


def test_two_choices_are_not_one_answer() -> None:
    body = chat("red", 2)
    body["choices"] *= 2
    with pytest.raises(WrongAnswer, match="no choice"):
        answers.chat(body, Expected(16))


def test_a_refusal_needs_a_4xx_and_a_complete_error() -> None:
    error = {"message": "no", "type": "invalid_request_error", "code": None, "param": None}
    answers.refusal(400, {"error": error})
    with pytest.raises(WrongAnswer, match="status 500"):
        answers.refusal(500, {"error": error})
    with pytest.raises(WrongAnswer, match="status 200"):
        answers.refusal(200, caption("a circle", 3))
    with pytest.raises(WrongAnswer, match="an error without"):
        answers.refusal(422, {"detail": "no"})


def test_only_a_200_is_a_success() -> None:
    answers.ok(200, b"")
    with pytest.raises(WrongAnswer, match="status 503: busy"):
        answers.ok(503, b"busy")
