"""Tokens of an answer to events, several tokens at once as beam search hands them out."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from blip2_serve.engine.answer import Answer
from blip2_serve.types import FinishReason, TokenEvent, TokenLogprob
from support.requests import make_request

EOS = 256  # all other tokens are bytes


def decode(ids: list[int]) -> str:
    return bytes(i for i in ids if i < EOS).decode("utf-8", errors="replace")


def answer(**params: Any) -> Answer:
    return Answer(make_request("a", 4, n=3, **params), 2, decode)


def tokens(text: str, *more: int) -> list[int]:
    return [*text.encode(), *more]


def add(
    to: Answer, new: list[int], reason: FinishReason | None = None
) -> tuple[list[int], str, str | None]:
    event = to.add(new, [], reason)
    return [*event.token_ids], event.text, event.finish_reason


def test_an_event_says_which_answer_it_is_of_and_how_long_the_prompt_was() -> None:
    assert answer().add(tokens("cat"), [], None) == TokenEvent(
        tuple(b"cat"), "cat", None, prompt_tokens=4, index=2
    )


@pytest.mark.parametrize(
    ("new", "reason", "expected"),
    [
        pytest.param(tokens("cat"), "length", (tokens("cat"), "cat", "length"), id="at the limit"),
        pytest.param(
            tokens("cat", EOS), "stop", (tokens("cat", EOS), "cat", "stop"), id="an end token"
        ),
        pytest.param([EOS], "stop", ([EOS], "", "stop"), id="nothing but an end token"),
        pytest.param(
            tokens("c", EOS, *b"at"),
            "length",
            (tokens("c", EOS, *b"at"), "cat", "length"),
            id="an end token that was ignored",
        ),
        pytest.param(
            tokens("a日")[:3],
            "length",
            (tokens("a日")[:3], "a\ufffd", "length"),
            id="half a character at the limit",
        ),
        pytest.param(
            [*tokens("a日")[:3], EOS],
            "stop",
            ([*tokens("a日")[:3], EOS], "a\ufffd", "stop"),
            id="half a character before an end token",
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
        pytest.param(tokens("one\ntwo\n"), None, id="of a search that goes on"),
        pytest.param(tokens("one\ntwo\n"), "length", id="at the limit"),
        pytest.param(tokens("one\ntwo", EOS), "stop", id="before an end token"),
    ],
)
def test_a_stop_string_within_several_tokens_makes_its_last_token_the_answers_last(
    new: list[int], reason: FinishReason | None
) -> None:
    assert add(answer(stop=("wo", "\nt")), new, reason) == (tokens("one\nt"), "one", "stop")


def test_a_stop_string_may_be_spread_over_calls() -> None:
    a = answer(stop=("##.",))
    assert add(a, tokens("one#")) == (tokens("one#"), "one", None)
    assert add(a, tokens("#")) == (tokens("#"), "", None)
    assert add(a, tokens(".two")) == (tokens("."), "", "stop")


@pytest.mark.parametrize(
    ("new", "reason"),
    [
        pytest.param(tokens("one##"), "length", id="at the limit"),
        pytest.param(tokens("one##", EOS), "stop", id="at an end token"),
    ],
)
def test_a_stop_string_that_was_only_begun_is_text(new: list[int], reason: FinishReason) -> None:
    a = answer(stop=("###",))
    assert add(a, new, reason) == (new, "one##", reason)


def test_a_stop_string_that_the_end_token_would_spell_is_text() -> None:
    a = Answer(make_request(stop=("</s>",)), 0, lambda ids: "".join(["a", "</s>"][i] for i in ids))
    assert add(a, [0, 1], "stop") == ([0, 1], "a", "stop")


def test_a_stop_string_next_to_half_a_character_in_the_very_last_token_is_a_stop() -> None:
    # Byte-level vocabularies have such tokens: decoding waits for the rest of the character.
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
        pytest.param(2, "a", id="the minimum is just reached"),
        pytest.param(3, "a.b", id="the first comes too early"),
        pytest.param(5, "a.b.c", id="the first two come too early"),
    ],
)
@pytest.mark.parametrize("at_once", [True, False], ids=["all at once", "one by one"])
def test_stop_strings_before_min_tokens_are_text(min_tokens: int, text: str, at_once: bool) -> None:
    a = answer(stop=(".",), min_tokens=min_tokens)
    seen = ""
    for new in [tokens("a.b.c.d.")] if at_once else [[token] for token in tokens("a.b.c.d.")]:
        _, piece, reason = add(a, new)
        seen += piece
        if reason:
            break
    assert (seen, reason) == (text, "stop")


def test_a_character_is_handed_out_whole() -> None:
    a = answer()
    first, second, third = tokens("日")
    assert add(a, [*tokens("a"), first]) == ([*b"a", first], "a", None)
    assert add(a, [second]) == ([second], "", None)
    assert add(a, [third, *b"b"]) == ([third, *b"b"], "日b", None)


def test_log_probabilities_come_with_their_tokens_and_end_with_the_last() -> None:
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
def test_however_the_tokens_are_cut_into_calls_the_answer_is_the_same(
    text: str, cuts: set[int], stop: tuple[str, ...], min_tokens: int, ends: bool
) -> None:
    line = tokens(text, EOS) if ends or not text else tokens(text)
    last: FinishReason = "stop" if line[-1] == EOS else "length"

    def read(borders: list[int]) -> tuple[list[int], str, str | None]:
        a = answer(stop=stop, min_tokens=min_tokens)
        ids: list[int] = []
        seen = ""
        reason = None
        for start, end in zip([0, *borders], [*borders, len(line)], strict=True):
            new, piece, reason = add(a, line[start:end], last if end == len(line) else None)
            ids, seen = ids + new, seen + piece
            if reason:
                break
        return ids, seen, reason

    assert read(sorted(cut for cut in cuts if cut < len(line))) == read([])
