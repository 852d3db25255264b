"""Beam search: which beams continue, which become answers, and when the search ends."""

from __future__ import annotations

from array import array
from itertools import product
from math import log
from random import Random
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from blip2_serve.engine.beam import BeamSearch, Candidate
from blip2_serve.engine.sequence import Sequence
from blip2_serve.types import TokenLogprob
from support.requests import make_request

EOS, OTHER_EOS = 0, 1
ENDS = frozenset({EOS})


class Search:
    """A search over hand-written candidates: (index of the beam, token, score)."""

    def __init__(self, num_beams: int = 2, ends: frozenset[int] = ENDS, **params: Any) -> None:
        request = make_request("a", num_beams=num_beams, **{"max_tokens": 10, **params})
        request.unused = array("q", range(10_000))
        self.search = BeamSearch(request, ends)
        self.beams = [Sequence(request)]
        self.agreed: list[int] = []

    def step(self, *candidates: tuple[int, int, float]) -> list[list[int]]:
        """Advances the search by a step and returns the tokens of its beams."""
        ordered = sorted(candidates, key=lambda candidate: -candidate[2])
        self.beams = self.search.step([Candidate(self.beams[i], t, s) for i, t, s in ordered])
        self.agreed += self.search.newly_agreed(self.beams)[0]
        return [beam.output for beam in self.beams]

    def answers(self) -> list[list[int]]:
        return [hypothesis.tokens for hypothesis in self.search.hypotheses]

    def scores(self) -> list[float]:
        return [hypothesis.score for hypothesis in self.search.hypotheses]


def test_the_best_continuations_of_all_beams_continue() -> None:
    search = Search(2)
    assert search.step((0, 5, -1.0), (0, 6, -2.0), (0, 7, -3.0)) == [[5], [6]]
    assert search.step((1, 8, -2.1), (1, 9, -2.2), (0, 5, -2.3)) == [[6, 8], [6, 9]]
    assert [beam.score for beam in search.beams] == [-2.1, -2.2]
    assert [beam.index for beam in search.beams] == [0, 1]


def test_forked_beams_share_the_slots_of_their_parent() -> None:
    search = Search(3)
    search.step((0, 5, -1.0), (0, 6, -2.0), (0, 7, -3.0))
    search.step((0, 5, -1.1), (0, 6, -1.2), (1, 7, -2.1))
    first, second, third = (beam.slots for beam in search.beams)
    assert first[0] == second[0] != third[0]
    assert len({first[1], second[1], third[1]}) == 3


def test_a_finished_beam_is_replaced_by_the_next_best() -> None:
    search = Search(2)
    assert search.step((0, EOS, -1.0), (0, 5, -2.0), (0, 6, -3.0), (0, 7, -4.0)) == [[5], [6]]
    assert search.answers() == [[EOS]]


def test_an_end_token_ranked_below_num_beams_is_dropped() -> None:
    search = Search(2)
    assert search.step((0, 5, -1.0), (0, 6, -2.0), (0, EOS, -3.0), (0, 7, -4.0)) == [[5], [6]]
    assert search.answers() == []


def test_scores_are_log_probabilities_divided_by_the_length_penalty() -> None:
    search = Search(2, length_penalty=2.0)
    search.step((0, EOS, -1.5), (0, 5, -2.0), (0, 6, -2.5))
    search.step((0, EOS, -4.0), (1, 5, -5.0), (1, 6, -6.0))
    assert search.answers() == [[5, EOS], [EOS]]
    assert search.scores() == [-4.0 / 2**2, -1.5]


@pytest.mark.parametrize(
    ("length_penalty", "best"),
    [
        pytest.param(0.0, [EOS], id="zero"),
        pytest.param(1.0, [5, EOS], id="positive, favours long answers"),
        pytest.param(-1.0, [EOS], id="negative, favours short answers"),
    ],
)
def test_the_length_penalty_decides_between_short_and_long(
    length_penalty: float, best: list[int]
) -> None:
    search = Search(2, length_penalty=length_penalty)
    search.step((0, EOS, -1.0), (0, 5, -1.1), (0, 6, -9.0))
    search.step((0, EOS, -1.2), (0, 5, -8.0), (1, 6, -9.0))
    assert search.answers()[0] == best


def test_only_the_num_beams_best_answers_are_kept() -> None:
    search = Search(2, length_penalty=2.0, early_stopping="never")
    search.step((0, EOS, -1.0), (0, 5, -1.1), (0, 6, -1.2))
    search.step((0, EOS, -1.2), (1, EOS, -1.3), (0, 5, -1.4), (0, 6, -1.5))
    assert search.answers() == [[5, EOS], [6, EOS]]
    search.step((0, EOS, -1.5), (0, 5, -1.6), (0, 6, -1.7))
    assert search.answers() == [[5, 5, EOS], [5, EOS]]


@pytest.mark.parametrize(
    ("early_stopping", "length_penalty", "over"),
    [
        pytest.param(True, 1.0, True, id="True ends it"),
        pytest.param(False, 1.0, False, id="False continues while a beam scores better"),
        pytest.param("never", 0.0, False, id="never continues while a beam is likelier"),
        pytest.param("never", 1.0, False, id="never continues while a beam could score better"),
        pytest.param("never", -1.0, False, id="never with a negative length penalty"),
    ],
)
def test_early_stopping_decides_once_there_are_num_beams_answers(
    early_stopping: bool, length_penalty: float, over: bool
) -> None:
    search = Search(2, early_stopping=early_stopping, length_penalty=length_penalty)
    search.step((0, EOS, -1.0), (0, 5, -1.1), (0, 6, -1.2))
    # The answers score -1.0, and -1.3 divided by the length penalty.
    search.step((0, EOS, -1.3), (1, 5, -1.25), (1, 6, -1.4), (0, 7, -1.5))
    assert len(search.answers()) == 2
    assert (search.beams == []) is over


def test_early_stopping_never_estimates_scores_at_max_tokens() -> None:
    def after_two_answers(early_stopping: Any) -> list[list[int]]:
        search = Search(2, early_stopping=early_stopping, max_tokens=100)
        search.step((0, EOS, -1.0), (0, 5, -1.1), (0, 6, -1.2))
        # -2.5 divided by two tokens is worse than both answers, but divided by 100 it is better.
        return search.step((0, EOS, -1.9), (0, 5, -2.5), (1, 6, -2.6))

    assert after_two_answers(False) == []
    assert after_two_answers("never") == [[5, 5], [6, 6]]


def test_the_search_continues_with_fewer_than_num_beams_answers() -> None:
    search = Search(3, early_stopping=True)
    search.step((0, EOS, -0.1), (0, 5, -5.0), (0, 6, -6.0), (0, 7, -7.0))
    assert search.step((0, EOS, -5.5), (0, 5, -9.0), (1, 6, -9.5), (2, 7, -9.9)) != []
    assert len(search.answers()) == 2


def test_early_stopping_counts_all_answers_of_its_last_step() -> None:
    search = Search(2, early_stopping=True)
    search.step((0, EOS, -1.0), (0, 5, -1.1), (0, 6, -1.2))
    assert search.step((0, EOS, -1.3), (1, EOS, -1.4), (0, 7, -2.0), (0, 8, -3.0)) == []
    assert search.answers() == [[5, EOS], [6, EOS]]


def test_at_max_tokens_the_best_beams_become_answers() -> None:
    search = Search(2, max_tokens=2)
    search.step((0, 5, -1.0), (0, 6, -2.0), (0, 7, -3.0))
    assert search.step((0, 8, -1.5), (0, EOS, -2.5), (1, 9, -2.6)) == []
    assert search.answers() == [[5, 8], [5, EOS]]
    assert [h.reason for h in search.search.hypotheses] == ["length", "stop"]


def test_ignored_end_tokens_are_ordinary_tokens() -> None:
    search = Search(2, ends=frozenset(), max_tokens=2)
    assert search.step((0, EOS, -1.0), (0, 5, -2.0), (0, 6, -3.0)) == [[EOS], [5]]
    search.step((0, EOS, -1.5), (1, 5, -2.5), (1, 6, -3.5))
    assert search.answers() == [[EOS, EOS], [5, 5]]
    assert {h.reason for h in search.search.hypotheses} == {"length"}


@pytest.mark.parametrize(
    ("ends", "expected"),
    [
        pytest.param([], 6, id="no end token"),
        pytest.param([EOS], 6, id="one end token"),
        pytest.param([EOS, OTHER_EOS], 9, id="two end tokens"),
    ],
)
def test_there_are_enough_candidates_for_all_beams_to_continue(
    ends: list[int], expected: int
) -> None:
    assert Search(3, ends=frozenset(ends)).search.candidates == expected


def test_log_probabilities_stay_with_their_tokens() -> None:
    search = Search(2, top_logprobs=0)

    def candidate(beam: int, token: int, score: float) -> Candidate:
        return Candidate(search.beams[beam], token, score, TokenLogprob(token, score))

    search.beams = search.search.step([candidate(0, 5, -1), candidate(0, 6, -2)])
    ending = [candidate(1, EOS, -2.5), candidate(1, 7, -3), candidate(0, 8, -4)]
    search.beams = search.search.step(ending)
    (answer,) = search.search.hypotheses
    for tokens, logprobs in [
        (answer.tokens, answer.logprobs),
        *((beam.output, beam.logprobs) for beam in search.beams),
    ]:
        assert [logprob.token_id for logprob in logprobs] == tokens


# -- agreed tokens ---------------------------------------------------------------------------------


def test_tokens_that_all_beams_share_are_agreed() -> None:
    search = Search(2)
    search.step((0, 5, -1.0), (0, 6, -2.0), (0, 7, -3.0))
    assert search.agreed == []
    search.step((1, 8, -2.1), (1, 9, -2.2), (0, 5, -9.0))
    assert search.agreed == [6]
    search.step((0, 8, -2.3), (0, 9, -2.4), (1, 5, -9.0))
    assert search.agreed == [6, 8]


def test_tokens_that_the_best_answer_lacks_are_not_agreed() -> None:
    search = Search(2, length_penalty=0.0)
    search.step((0, 5, -1.0), (0, EOS, -2.0), (0, 6, -3.0))
    assert search.step((0, 8, -1.1), (0, 9, -1.2), (1, 5, -9.0)) == [[5, 8], [5, 9]]
    assert search.agreed == []
    search.step((0, EOS, -1.3), (0, 7, -1.4), (0, 6, -1.5))  # a better answer with that prefix
    assert search.agreed == [5, 8]


def test_at_the_end_the_rest_of_the_best_answer_is_agreed() -> None:
    search = Search(2, early_stopping=True)
    search.step((0, 5, -1.0), (0, 6, -2.0), (0, 7, -3.0))
    search.step((0, EOS, -1.1), (1, EOS, -2.1), (0, 8, -3.0), (0, 9, -4.0))
    assert search.beams == []
    assert search.agreed == [5, EOS]


class Language:
    """A random language model: a distribution of the next token for every prefix."""

    def __init__(self, seed: int, vocabulary: int = 4) -> None:
        self.seed = seed
        self.vocabulary = vocabulary

    def logprobs(self, beginning: list[int]) -> list[float]:
        random = Random(f"{self.seed} {beginning}")
        weights = [random.random() ** 3 + 1e-6 for _ in range(self.vocabulary)]
        return [log(weight / sum(weights)) for weight in weights]

    def run(self, search: Search) -> None:
        """Runs the search to its end, checking the agreed tokens after every step."""
        while search.beams:
            candidates = [
                (i, token, beam.score + logprob)
                for i, beam in enumerate(search.beams)
                for token, logprob in enumerate(self.logprobs(beam.output))
            ]
            candidates.sort(key=lambda candidate: -candidate[2])
            before = [*search.agreed]
            search.step(*candidates[: search.search.candidates])
            assert search.agreed[: len(before)] == before
            outputs = [beam.output for beam in search.beams] + search.answers()[:1]
            assert all(output[: len(search.agreed)] == search.agreed for output in outputs)

    def all_answers(self, max_tokens: int, length_penalty: float) -> list[tuple[float, list[int]]]:
        """Returns every possible answer and its score, best first."""
        answers = []
        for length in range(1, max_tokens + 1):
            for tokens in product(range(self.vocabulary), repeat=length):
                whole = tokens[-1] == EOS or length == max_tokens
                if whole and EOS not in tokens[:-1]:
                    answer = [*tokens]
                    total = sum(self.logprobs(answer[:i])[token] for i, token in enumerate(answer))
                    answers.append((total / length**length_penalty, answer))
        return sorted(answers, reverse=True)


penalties = st.sampled_from([-1.0, 0.0, 0.5, 1.0, 2.0])
stoppings = st.sampled_from([True, False, "never"])


@given(st.integers(0, 10_000), st.integers(2, 5), st.integers(1, 8), penalties, stoppings)
def test_agreed_tokens_add_up_to_the_best_answer(
    seed: int, num_beams: int, max_tokens: int, length_penalty: float, early_stopping: Any
) -> None:
    search = Search(
        num_beams,
        max_tokens=max_tokens,
        length_penalty=length_penalty,
        early_stopping=early_stopping,
    )
    Language(seed, vocabulary=8).run(search)
    assert search.agreed == search.answers()[0]
    assert search.scores() == sorted(search.scores(), reverse=True)
    assert len(search.answers()) == num_beams
    assert all(len(answer) <= max_tokens for answer in search.answers())
    assert len({tuple(answer) for answer in search.answers()}) == num_beams


@given(st.integers(0, 10_000), st.integers(1, 3), penalties)
def test_with_a_beam_for_every_answer_the_search_is_exhaustive(
    seed: int, max_tokens: int, length_penalty: float
) -> None:
    language = Language(seed)
    expected = language.all_answers(max_tokens, length_penalty)
    search = Search(
        64, max_tokens=max_tokens, length_penalty=length_penalty, early_stopping="never"
    )
    language.run(search)
    assert search.answers() == [tokens for _, tokens in expected]
    assert search.scores() == pytest.approx([score for score, _ in expected])
