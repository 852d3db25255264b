"""A request whose logits are not finite fails alone."""

from __future__ import annotations

from typing import Any

import pytest

from blip2_serve.engine.step import NO_NUMBERS
from blip2_serve.errors import Blip2ServeError
from support.byte_tokens import tokens
from support.engine_bench import Bench

pytestmark = pytest.mark.usefixtures("devices")


@pytest.mark.parametrize("params", [{}, {"n": 2}, {"num_beams": 2}, {"num_beams": 2, "n": 2}])
@pytest.mark.parametrize("place", [0, 1, 4])
def test_only_the_request_without_numbers_fails(place: int, params: dict[str, Any]) -> None:
    bench = Bench(max_num_seqs=6, prefix_caching=True)
    good, bad = tokens("a cat"), tokens("a cow")
    bad[place] = NO_NUMBERS
    bench.add("before", "another one")
    scripts = [good, bad] if params else [bad]
    bench.add("bad", *scripts, prompt=[1, 2, 3], **params)
    bench.add("beams", "the cat", "the dog", num_beams=2)
    bench.finish()
    error = bench.failures.pop("bad")
    assert not bench.failures
    assert type(error) is Blip2ServeError
    assert error.status == 500
    assert not any(event.last for event in bench.events["bad"])
    assert bench.texts("before") == ["another one"]
    assert bench.texts("beams") == ["the cat"]


@pytest.mark.parametrize("sent", [(), (tuple(tokens("x")),)])
def test_nothing_of_its_prompt_is_cached(sent: tuple[tuple[int, ...], ...]) -> None:
    bench = Bench(prefix_caching=True)
    bench.add("bad", [*tokens("x" * len(sent)), NO_NUMBERS], prompt=40, max_tokens=9, sent=sent)
    bench.finish()
    assert [*bench.failures] == ["bad"]
    assert bench.engine.stats().kv_slots_used == bench.engine.stats().kv_slots_cached == 0


def test_those_in_a_row_are_counted() -> None:
    bench = Bench(max_num_seqs=8)
    counts = []
    for number, script in enumerate(["!", "!", "good", "!", "a!", "!"]):
        bench.add(f"{number}", [NO_NUMBERS if t == ord("!") else t for t in tokens(script)])
        bench.finish()
        counts.append(bench.engine.without_numbers)
    assert counts == [1, 2, 0, 1, 1, 2]
    for name in "abc":
        bench.add(name, [NO_NUMBERS])
    bench.finish()
    assert bench.engine.without_numbers == 5


def test_a_sample_that_has_stopped_already_harms_no_other() -> None:
    bench = Bench()
    bench.add("a", [*tokens("a."), NO_NUMBERS], "cat sits", n=2, stop=(".",), max_tokens=8)
    bench.finish()
    assert bench.texts("a") == ["a", "cat sits"]
