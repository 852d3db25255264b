"""Beam search in the engine."""

from __future__ import annotations

import pytest

from support.byte_tokens import EOS, tokens
from support.engine_bench import Bench

pytestmark = pytest.mark.usefixtures("devices")


def test_beam_search_streams_tokens_once_they_are_certain() -> None:
    bench = Bench()
    bench.add("a", "the cat sits", "the cow runs", num_beams=2, early_stopping=True)
    bench.finish()
    assert bench.texts("a") == ["the cat sits"]
    pieces = [e.text for e in bench.events["a"]]
    # Both beams start with "the c"; the rest is certain only at the end.
    assert len(pieces) > 2
    assert len(pieces[-1]) == len("at sits")


def test_several_answers_of_a_beam_search_come_at_its_end_best_first() -> None:
    bench = Bench()
    scripts = [tokens("cat", EOS), tokens("cow", EOS), tokens("dog", EOS)]
    bench.add("a", *scripts, num_beams=3, n=2, early_stopping=True)
    bench.finish()
    assert bench.texts("a") == ["cat", "cow"]
    assert len(bench.events["a"]) == 2


def test_the_end_of_a_beam_search_frees_all_slots() -> None:
    bench = Bench()
    bench.add("a", "the cat", "the cow", num_beams=3)
    bench.step()
    bench.step()
    assert bench.engine.stats().running == 3
    assert bench.engine.stats().kv_slots_used == 3 + 3 * 6
    bench.finish()
    assert bench.engine.stats().kv_slots_used == 0


def test_a_stop_string_in_all_beams_ends_the_search() -> None:
    bench = Bench()
    bench.add("a", "a. cat sat", "a. cow ate", "a. dog ran", num_beams=3, stop=(".",))
    bench.finish()
    assert bench.answer("a") == (tokens("a."), "a", "stop")
    assert bench.engine.stats().steps < len("a. cat sat")


def test_stop_strings_cut_each_answer_of_a_beam_search() -> None:
    bench = Bench()
    bench.add("a", "one.two", "one two", "o.n.e.s", num_beams=3, n=3, stop=(".",))
    bench.finish()
    assert bench.texts("a") == ["one", "one two", "o"]
    assert [bench.answer("a", i)[2] for i in range(3)] == ["stop", "length", "stop"]
    assert bench.answer("a", 2)[0] == tokens("o.")


def test_concurrent_beam_searches_and_samples_do_not_mix() -> None:
    bench = Bench(max_num_seqs=10)
    bench.add("a", "abcdef", "abcxyz", num_beams=2, n=2)
    bench.add("b", "123456", "123789", n=2)
    bench.step()
    bench.add("c", "uvwxyz", "uvwabc", "123456", num_beams=3, n=3)
    bench.add("d", "greedy")
    bench.finish()
    assert bench.texts("a") == ["abcdef", "abcxyz"]
    assert bench.texts("b") == ["123456", "123789"]
    assert bench.texts("c") == ["uvwxyz", "uvwabc", "123456"]
    assert bench.texts("d") == ["greedy"]


def test_a_search_that_is_shown_tells_of_its_beams_at_each_step() -> None:
    bench = Bench()
    scripts = [tokens("cat", EOS), tokens("dog", EOS)]
    bench.add("a", *scripts, num_beams=2, n=2, early_stopping=True, show_beams=True)
    bench.finish()

    shown = [[beam.text for beam in e.beams] for e in bench.events["a"] if e.beams]
    assert shown[:2] == [["c", "d"], ["ca", "do"]]
    assert shown[-1] == ["cat", "dog"]
    ended = [beam.ended for event in bench.events["a"][-3:] for beam in event.beams]
    assert all(ended)
    for event in bench.events["a"]:
        scores = [beam.score for beam in event.beams]
        assert scores == sorted(scores, reverse=True)
        assert not (event.beams and event.token_ids)  # what is told belongs to no answer


def test_beams_that_are_shown_change_no_answer() -> None:
    scripts = ["the cat sits", "the cow runs", tokens("the", EOS)]
    answers = []
    for show in (False, True):
        bench = Bench()
        bench.add("a", *scripts, num_beams=3, show_beams=show)
        bench.finish()
        answers.append(bench.answer("a"))
        assert bench.events["a"][-1].last
    assert answers[0] == answers[1]
