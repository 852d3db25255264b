"""Prefix caching in the scheduler."""

from __future__ import annotations

from typing import Any

import pytest

from support.scheduling import Simulation, make_scheduler

PROMPT = [5, 1, 5, 2, 5, 3, 5, 4, 5, 5]


def served(*requests: dict[str, Any], prefix_caching: bool = True) -> Simulation:
    """Returns a simulation that has served these requests, one after the other."""
    simulation = Simulation(
        make_scheduler(200, max_num_batched_tokens=50, prefix_caching=prefix_caching), 4, 50
    )
    for request in requests:
        simulation.add(**{"prompt": PROMPT, "max_tokens": 4, **request})
        while simulation.scheduler.has_work:
            simulation.step()
    return simulation


def computed(simulation: Simulation, prompt: list[int], **params: Any) -> int:
    """Adds a request and returns how many tokens of its prompt are computed."""
    request = simulation.add(prompt, 2, **params)
    (chunk,) = simulation.step()
    assert chunk.sequence.request is request
    assert chunk.end == len(prompt)
    return chunk.end - chunk.start


@pytest.mark.parametrize(
    "earlier",
    [
        pytest.param({}, id="after one answer"),
        pytest.param({"n": 3}, id="after samples"),
        pytest.param({"num_beams": 3}, id="after beams"),
        pytest.param({"max_tokens": 1}, id="after one token"),
        pytest.param({"prompt": [*PROMPT, 6, 7]}, id="after a longer prompt"),
    ],
)
@pytest.mark.parametrize(
    "later", [{}, {"n": 3}, {"num_beams": 3}], ids=["one answer", "samples", "beams"]
)
def test_only_the_last_token_of_a_cached_prompt_is_computed(
    earlier: dict[str, Any], later: dict[str, Any]
) -> None:
    simulation = served(earlier)
    assert computed(simulation, PROMPT, **later) == 1
    assert simulation.scheduler.cached_tokens == len(PROMPT) - 1
    simulation.finish()
    simulation.check_answers()


def test_the_prompt_of_a_running_request_is_cached() -> None:
    simulation = Simulation(make_scheduler(200, max_num_batched_tokens=50), 4, 50)
    simulation.add(PROMPT, 20)
    simulation.step()
    later = simulation.add([*PROMPT, 6], 2)
    chunks = simulation.step()
    assert [(c.start, c.end) for c in chunks if c.sequence.request is later] == [(10, 11)]


@pytest.mark.parametrize(
    "params", [{}, {"n": 2}, {"num_beams": 2}], ids=["one answer", "samples", "beams"]
)
def test_an_answer_is_cached_for_the_next_prompt(params: dict[str, int]) -> None:
    simulation = served(params)
    answer = simulation.answers["0"][-1]  # with beams, the cached one
    # Computed are 8, 9 and the answer's last token, which was never fed back.
    assert computed(simulation, [*PROMPT, *answer, 8, 9]) == 3


@pytest.mark.parametrize(
    ("prefix_caching", "prompt", "digest", "expected"),
    [
        pytest.param(True, PROMPT, "other", 10, id="different image"),
        pytest.param(True, [*PROMPT[:4], 8, 8], "picture", 2, id="different end"),
        pytest.param(True, [8, *PROMPT[1:]], "picture", 10, id="different first token"),
        pytest.param(True, PROMPT[:1], "picture", 1, id="single token"),
        pytest.param(False, PROMPT, "picture", 10, id="prefix caching off"),
    ],
)
def test_tokens_that_are_not_cached_are_computed(
    prefix_caching: bool, prompt: list[int], digest: str, expected: int
) -> None:
    simulation = served({}, prefix_caching=prefix_caching)
    assert computed(simulation, prompt, digest=digest) == expected


def test_without_prefix_caching_nothing_is_cached() -> None:
    simulation = served({}, {"n": 3}, {"num_beams": 3}, prefix_caching=False)
    assert simulation.scheduler.cached.slots == 0
    assert simulation.scheduler.kv.used == 0


def test_cached_slots_are_evicted_for_new_requests() -> None:
    simulation = Simulation(make_scheduler(slots=20, max_num_batched_tokens=50), 4, 50)
    for first_token in range(5):
        simulation.add([first_token] * 12, 5)  # needs 16 slots
        while simulation.scheduler.has_work:
            simulation.step()
    assert simulation.scheduler.cached.slots > 0
    assert computed(simulation, [4] * 12) == 1  # the latest prompt is still cached
    simulation.finish()


def test_cached_slots_never_delay_a_request() -> None:
    simulation = served(*({"prompt": [i] * 40, "max_tokens": 10} for i in range(8)))
    assert simulation.scheduler.kv.free < 50
    simulation.add([8] * 45, 6)
    simulation.add([9] * 45, 6)
    simulation.step()
    assert len(simulation.scheduler.running) == 2


def test_waiting_does_not_evict_the_requests_own_prefix() -> None:
    simulation = Simulation(make_scheduler(slots=40, max_num_batched_tokens=50), 4, 50)
    simulation.add([1] * 10, 1)
    simulation.step()
    simulation.add([2] * 10, 16)  # needs 25 slots, which leaves 5 free and 10 cached
    simulation.step()
    waiting = simulation.add([*[1] * 10, 3], 10)  # needs 10 slots beside the cached ones
    while waiting in simulation.scheduler.waiting:
        simulation.step()
    assert simulation.scheduler.cached_tokens == 10
    simulation.finish()


def test_a_request_that_cannot_be_admitted_evicts_nothing() -> None:
    simulation = Simulation(make_scheduler(slots=60, max_num_batched_tokens=50), 4, 50)
    simulation.add([1] * 20, 1)
    simulation.step()  # leaves 20 slots cached that no request holds
    simulation.add([2] * 10, 21)  # needs 30 slots
    simulation.step()
    waiting = simulation.add([3] * 40, 5)  # needs 44 slots: 10 are free, 20 more are evictable
    for _ in range(5):
        simulation.step()
        assert waiting in simulation.scheduler.waiting
        still_cached = simulation.scheduler.cached.match("picture", [1] * 20)
        simulation.scheduler.kv.release(still_cached)
        assert len(still_cached) == 20
    simulation.finish()
