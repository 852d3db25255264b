"""Cuts a run of the engine at any point, to compare what a second one adds with the rest."""

from __future__ import annotations

from collections.abc import Iterator
from functools import reduce
from itertools import product
from operator import add
from random import Random

from blip2_serve.types import TokenEvent

Sent = tuple[tuple[int, ...] | None, ...]


def by_answer(events: list[TokenEvent], n: int) -> list[list[TokenEvent]]:
    return [[event for event in events if event.index == index] for index in range(n)]


def cuts(events: list[TokenEvent], n: int, most: int = 60) -> Iterator[tuple[Sent, list[int]]]:
    """What may have been sent, and how many events of each answer that was.

    All combinations of one cut per answer, or `most` of them; never all answers whole.
    """
    answers = by_answer(events, n)
    every = [*product(*(range(len(answer) + 1) for answer in answers))]
    every.remove(tuple(map(len, answers)))
    for counts in every if len(every) <= most else Random(0).sample(every, most):
        sent = tuple(
            None if count == len(answer) else tokens_of(answer[:count])
            for count, answer in zip(counts, answers, strict=True)
        )
        yield sent, [*counts]


def tokens_of(events: list[TokenEvent]) -> tuple[int, ...]:
    return tuple(token for event in events for token in event.token_ids)


def rest(events: list[TokenEvent], counts: list[int]) -> dict[int, TokenEvent]:
    """By answer, all events but so many of the first, as one, if there are any."""
    answers = enumerate(zip(by_answer(events, len(counts)), counts, strict=True))
    # Which answer is the last to end depends on what was sent of the others.
    return {
        index: reduce(add, answer[count:]) for index, (answer, count) in answers if answer[count:]
    }


def check_last(events: list[TokenEvent]) -> None:
    """Asserts that the last event, and no other, is marked as the last."""
    assert [event.last for event in events] == [False] * (len(events) - 1) + [True]
