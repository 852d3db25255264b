"""Requests whose time is over leave the engine when the next step is formed."""

from __future__ import annotations

from typing import Any

import pytest

from blip2_serve.errors import TimedOut
from support.engine_bench import Bench

pytestmark = pytest.mark.usefixtures("devices")


@pytest.mark.parametrize("params", [{}, {"n": 2}, {"num_beams": 2}])
@pytest.mark.parametrize("steps", range(5))
def test_a_running_request_ends_when_its_time_is_over(params: dict[str, Any], steps: int) -> None:
    bench = Bench(step=8)
    bench.add("a", "cat sits", "cow runs", prompt=10, expires=5.0, **params)
    bench.add("b", "another")
    for _ in range(steps):
        bench.step()
    before = len(bench.events["a"])
    bench.now = 4.9
    bench.step()
    assert not bench.failures
    after = len(bench.events["a"])
    assert after >= before
    bench.now = 5.0
    bench.step()
    assert isinstance(bench.failures["a"], TimedOut)
    assert len(bench.events["a"]) == after
    bench.finish()
    assert bench.texts("b") == ["another"]


def test_a_waiting_request_ends_when_its_time_is_over() -> None:
    bench = Bench(max_num_seqs=1)
    bench.add("a", "a long answer")
    for name, expires in (("b", 7.0), ("c", 3.0), ("d", None)):
        bench.add(name, "x", expires=expires)
    failed = []
    for now in range(10):
        bench.now = now
        bench.step()
        failed.append([*bench.failures])
    assert failed == [[]] * 3 + [["c"]] * 4 + [["c", "b"]] * 3
    bench.finish()
    assert bench.texts("a") == ["a long answer"]
    assert bench.texts("d") == ["x"]
    assert not bench.events["b"]


def test_requests_that_ended_earlier_do_not_expire() -> None:
    bench = Bench()
    bench.add("a", "cat", expires=1.0)
    bench.add("b", "a long answer", expires=2.0)
    bench.add("c", "horses", expires=9.0)
    while len(bench.events["a"]) < 3:
        bench.step()
    bench.engine.abort("b")
    bench.now = 3.0
    bench.finish()
    assert not bench.failures
    assert bench.texts("c") == ["horses"]


def test_a_request_may_come_too_late() -> None:
    bench = Bench()
    bench.now = 4.0
    bench.add("a", "cat", expires=3.0)
    bench.step()
    assert [*bench.failures] == ["a"]
    assert bench.engine.stats().steps == 0
    bench.finish()
