"""Tokens of an answer become events, also when several arrive at once as in beam search."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from blip2_serve.engine.answer import Answer
from blip2_serve.types import FinishReason, TokenEvent, TokenLogprob
from support.byte_tokens import EOS, decode, tokens
from support.requests import make_request


def answer(**params: Any) -> Answer:
    return Answer(make_request("a", 4, n=3, **params), 2, decode)


def add(
    to: Answer, new: list[int], reason: FinishReason | None = None
) -> tuple[list[int], str, str | None]:
    event = to.add(new, [], reason)
    return [*event.token_ids], event.text, event.finish_reason


def test_events_have_the_index_and_the_length_of_the_prompt() -> None:
    assert answer().add(tokens("cat"), [], None) == TokenEvent(
        tuple(b"cat"), "cat", None, prompt_tokens=4, index=2
    )


@pytest.mark.parametrize(
    ("new", "reason", "expected"),
    [
        pytest.param(tokens("cat"), "length", (tokens("cat"), "cat", "length"), id="at max_tokens"),
        pytest.param(
            tokens("cat", EOS), "stop", (tokens("cat", EOS), "cat", "stop"), id="end token"
        ),
        pytest.param([EOS], "stop", ([EOS], "", "stop"), id="only an end token"),
        pytest.param(
            tokens("c", EOS, *b"at"),
            "length",
            (tokens("c", EOS, *b"at"), "cat", "length"),
            id="ignored end token",
        ),
        pytest.param(
            tokens("a日")[:3],
            "length",
            (tokens("a日")[:3], "a\ufffd", "length"),
            id="incomplete character at max_tokens",
        ),
        pytest.param(
            [*tokens("a日")[:3], EOS],
            "stop",
            ([*tokens("a日")[:3], EOS], "a\ufffd", "stop"),
            id="incomplete character before an end token",
        ),
    ],
)
def test_the_last_tokens_end_the_answer(
    new: list[int], reason: FinishReason, expected: tuple[list[int], str, str]
) -> None:
    assert add(answer(), new, reason) == expected


@pytest.mark.parametrize(
    ("new", "reason"),
    [
        pytest.param(tokens("one\ntwo\n"), None, id="answer continues"),
        pytest.param(tokens("one\ntwo\n"), "length", id="at max_tokens"),
        pytest.param(tokens("one\ntwo", EOS), "stop", id="at an end token"),
    ],
)
def test_a_stop_string_drops_the_tokens_after_it(
    new: list[int], reason: FinishReason | None
) -> None:
    assert add(answer(stop=("wo", "\nt")), new, reason) == (tokens("one\nt"), "one", "stop")


def test_a_stop_string_can_span_calls() -> None:
    a = answer(stop=("##.",))
    assert add(a, tokens("one#")) == (tokens("one#"), "one", None)
    assert add(a, tokens("#")) == (tokens("#"), "", None)
    assert add(a, tokens(".two")) == (tokens("."), "", "stop")


@pytest.mark.parametrize(
    ("new", "reason"),
    [
        pytest.param(tokens("one##"), "length", id="at max_tokens"),
        pytest.param(tokens("one##", EOS), "stop", id="at an end token"),
    ],
)
def test_an_incomplete_stop_string_is_text(new: list[int], reason: FinishReason) -> None:
    a = answer(stop=("###",))
    assert add(a, new, reason) == (new, "one##", reason)


def test_the_text_of_an_end_token_is_no_stop_string() -> None:
    a = Answer(make_request(stop=("</s>",)), 0, lambda ids: "".join(["a", "</s>"][i] for i in ids))
    assert add(a, [0, 1], "stop") == ([0, 1], "a", "stop")


def test_a_stop_string_before_an_incomplete_character_in_the_last_token_is_a_stop() -> None:
    # Byte-level vocabularies have such tokens, and decoding waits for the rest of the character.
    pieces = [b"one", b"\n\xe2\x80"]
    a = Answer(
        make_request(stop=("\n",)),
        0,
        lambda ids: b"".join(pieces[i] for i in ids).decode("utf-8", errors="replace"),
    )
    assert add(a, [0, 1], "length") == ([0, 1], "one", "stop")


@pytest.mark.parametrize(
    ("min_tokens", "text"),
    [
        pytest.param(0, "a", id="no minimum"),
        pytest.param(2, "a", id="first at the minimum"),
        pytest.param(3, "a.b", id="first too early"),
        pytest.param(5, "a.b.c", id="first two too early"),
    ],
)
@pytest.mark.parametrize("at_once", [True, False], ids=["all at once", "one by one"])
def test_stop_strings_before_min_tokens_are_text(min_tokens: int, text: str, at_once: bool) -> None:
    a = answer(stop=(".",), min_tokens=min_tokens)
    text_so_far = ""
    for new in [tokens("a.b.c.d.")] if at_once else [[token] for token in tokens("a.b.c.d.")]:
        _, piece, reason = add(a, new)
        text_so_far += piece
        if reason:
            break
    assert (text_so_far, reason) == (text, "stop")


def test_characters_are_not_split() -> None:
    a = answer()
    first, second, third = tokens("日")
    assert add(a, [*tokens("a"), first]) == ([*b"a", first], "a", None)
    assert add(a, [second]) == ([second], "", None)
    assert add(a, [third, *b"b"]) == ([third, *b"b"], "日b", None)


def test_dropped_tokens_have_no_log_probabilities() -> None:
    a = answer(stop=(".",))
    logprobs = [TokenLogprob(token, -float(i)) for i, token in enumerate(tokens("a.b"))]
    event = a.add(tokens("a.b"), logprobs, None)
    assert event.token_ids == tuple(b"a.")
    assert event.logprobs == tuple(logprobs[:2])


@given(
    st.text("ab.é日", max_size=12),
    st.sets(st.integers(1, 40)),
    st.sampled_from([(), (".",), ("é", "日."), ("ab",)]),
    st.integers(0, 6),
    st.booleans(),
)
def test_the_answer_does_not_depend_on_how_tokens_are_grouped(
    text: str, cuts: set[int], stop: tuple[str, ...], min_tokens: int, ends: bool
) -> None:
    whole = tokens(text, EOS) if ends or not text else tokens(text)
    last: FinishReason = "stop" if whole[-1] == EOS else "length"

    def read(borders: list[int]) -> tuple[list[int], str, str | None]:
        a = answer(stop=stop, min_tokens=min_tokens)
        ids: list[int] = []
        text_so_far = ""
        reason = None
        for start, end in zip([0, *borders], [*borders, len(whole)], strict=True):
            new, piece, reason = add(a, whole[start:end], last if end == len(whole) else None)
            ids, text_so_far = ids + new, text_so_far + piece
            if reason:
                break
        return ids, text_so_far, reason

    assert read(sorted(cut for cut in cuts if cut < len(whole))) == read([])
