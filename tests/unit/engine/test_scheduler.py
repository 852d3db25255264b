from __future__ import annotations

from random import Random
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from blip2_serve.engine.sequence import Chunk
from blip2_serve.errors import ContextLengthExceeded, InvalidRequest, Overloaded
from support.requests import make_request
from support.scheduling import Simulation, make_scheduler


def work(chunks: list[Chunk]) -> list[tuple[str, int, int]]:
    return [(c.sequence.request.id, c.start, c.end) for c in chunks]


prompts = st.lists(st.integers(0, 1), min_size=1, max_size=15)
widths = st.sampled_from([{}, {}, {"n": 3}, {"num_beams": 2}, {"num_beams": 4, "n": 2}])
actions = st.one_of(
    st.tuples(
        st.just("add"), prompts, st.integers(1, 6), st.integers(1, 8), widths, st.sampled_from("xy")
    ),
    st.tuples(
        st.just("resume"),
        prompts,
        st.lists(st.none() | st.integers(0, 6), min_size=1, max_size=4).filter(
            lambda sent: sent != [None] * len(sent)
        ),
        st.integers(1, 4),
    ),
    st.tuples(st.just("step")),
    st.tuples(st.just("abort"), st.integers(0, 100)),
)


@given(
    st.lists(actions, max_size=60),
    st.integers(35, 80),
    st.integers(4, 9),
    st.integers(1, 12),
    st.booleans(),
)
def test_every_request_is_served_in_order_of_arrival(
    plan: list[tuple[Any, ...]],
    slots: int,
    max_num_seqs: int,
    prompt_tokens: int,
    prefix_caching: bool,
) -> None:
    max_num_batched_tokens = max_num_seqs + prompt_tokens
    scheduler = make_scheduler(
        slots,
        max_num_seqs,
        max_num_batched_tokens=max_num_batched_tokens,
        prefix_caching=prefix_caching,
    )
    simulation = Simulation(scheduler, max_num_seqs, max_num_batched_tokens)
    for name, *arguments in plan:
        if name == "add":
            *arguments, params, digest = arguments
            simulation.add(*arguments, digest=digest, **params)
        elif name == "resume":
            prompt, lengths, more = arguments
            simulation.add(
                prompt,
                more + max(length or 0 for length in lengths),
                n=len(lengths),
                sent=tuple(None if length is None else (1,) * length for length in lengths),
            )
        else:
            getattr(simulation, name)(*arguments)
    simulation.finish()
    simulation.check_answers()


def test_a_thousand_requests_share_slots_for_sixteen() -> None:
    random = Random(0)
    typical = make_request(prompt=16, max_tokens=8, num_beams=3).slots_needed
    simulation = Simulation(make_scheduler(16 * typical, 24, max_num_batched_tokens=40), 24, 40)
    prefix = [random.randrange(3) for _ in range(10)]
    params: list[dict[str, int]] = [{}, {}, {"n": 4}, {"num_beams": 5}, {"num_beams": 8, "n": 8}]
    for _ in range(1000):
        prompt = prefix[: random.randint(0, 10)] + [0] * random.randint(1, 20)
        simulation.add(
            prompt,
            random.randint(1, 20),
            random.randint(1, 30),
            digest=random.choice("xyz"),
            **random.choice(params),
        )
    simulation.finish()
    simulation.check_answers()
    assert len(simulation.answers) == 1000
    assert simulation.scheduler.cached_tokens > 1000


def test_a_long_prompt_does_not_stop_running_sequences() -> None:
    simulation = Simulation(make_scheduler(slots=200, max_num_batched_tokens=8), 4, 8)
    simulation.add([1, 1], 50)
    simulation.add([2, 2], 50)
    simulation.step()
    simulation.add(40, 1)
    chunks = []
    while not simulation.answers["2"]:
        chunks.append(work(simulation.step()))
    decoded = [[name for name, start, end in step if end - start == 1] for step in chunks]
    assert decoded == [["0", "1"]] * 7
    assert [step[-1] for step in chunks] == [
        ("2", 0, 6),
        ("2", 6, 12),
        ("2", 12, 18),
        ("2", 18, 24),
        ("2", 24, 30),
        ("2", 30, 36),
        ("2", 36, 40),
    ]


def test_prompts_share_a_step_oldest_first() -> None:
    s = make_scheduler(max_num_batched_tokens=8)
    for name, prompt in [("a", 5), ("b", 5), ("c", 5)]:
        s.add(make_request(name, prompt))
    chunks = s.schedule().chunks
    assert work(chunks) == [("a", 0, 5), ("b", 0, 3)]
    assert [c.completes for c in chunks] == [True, False]


def test_a_request_waits_until_all_slots_it_needs_are_free() -> None:
    s = make_scheduler(slots=20)
    first = make_request("a", 10, max_tokens=3)  # needs 12 slots
    second = make_request("b", 8, max_tokens=2)  # needs 9 slots
    s.add(first)
    s.add(second)
    assert work(s.schedule().chunks) == [("a", 0, 8)]
    assert list(s.waiting) == [second]
    s.release(first)
    assert work(s.schedule().chunks) == [("b", 0, 8)]


@pytest.mark.parametrize(
    "params",
    [
        pytest.param({"n": 3}, id="three samples"),
        pytest.param({"num_beams": 3}, id="three beams"),
        pytest.param({"num_beams": 3, "n": 2}, id="three beams, two answers"),
    ],
)
def test_a_request_needs_its_prompt_once_and_the_tokens_of_each_sequence(
    params: dict[str, int],
) -> None:
    simulation = Simulation(make_scheduler(slots=10 + 3 * 4), 4, 8)
    request = simulation.add(10, 5, **params)
    assert request.slots_needed == 10 + 3 * 4
    simulation.step()
    assert simulation.scheduler.kv.free == 0
    simulation.finish()
    simulation.check_answers()


def test_a_short_request_does_not_overtake_a_long_one() -> None:
    s = make_scheduler(slots=20)
    for name, prompt in [("a", 15), ("long", 10), ("short", 1)]:
        s.add(make_request(name, prompt))
    s.schedule()
    assert [w.id for w in s.waiting] == ["long", "short"]


def test_at_most_max_num_seqs_run() -> None:
    s = make_scheduler(max_num_seqs=2)
    for name in "abc":
        s.add(make_request(name, 1))
    assert work(s.schedule().chunks) == [("a", 0, 1), ("b", 0, 1)]
    assert [w.id for w in s.waiting] == ["c"]


@pytest.mark.parametrize("name", ["n", "num_beams"])
def test_a_request_in_prefill_counts_all_its_future_sequences(name: str) -> None:
    s = make_scheduler(max_num_seqs=4)
    s.add(make_request("a", 20, **{name: 3}))
    s.add(make_request("b", 1))
    s.add(make_request("c", 1))
    s.schedule()
    assert [r.id for r in s.running] == ["a", "b"]
    assert s.running_sequences == 4


@pytest.mark.parametrize(
    ("params", "param"),
    [
        pytest.param({"n": 5}, "n", id="samples"),
        pytest.param({"num_beams": 5}, "num_beams", id="beams"),
        pytest.param({"num_beams": 5, "n": 5}, "num_beams", id="as many answers as beams"),
    ],
)
def test_a_request_with_more_than_max_num_seqs_sequences_is_rejected(
    params: dict[str, int], param: str
) -> None:
    s = make_scheduler(max_num_seqs=4)
    with pytest.raises(InvalidRequest) as error:
        s.add(make_request("a", 1, **params))
    assert error.value.param == param
    assert "4" in str(error.value)
    assert not s.has_work


def test_the_last_token_needs_no_slot() -> None:
    simulation = Simulation(make_scheduler(slots=6), 4, 8)
    simulation.add(4, 3)
    simulation.finish()
    simulation.check_answers()


def test_slots_of_a_finished_request_are_reused_first() -> None:
    s = make_scheduler(slots=1000, prefix_caching=False)
    first = make_request("a", 10)
    s.add(first)
    s.schedule()
    slots = set(first.slots)
    s.end(first.sequences[0])
    second = make_request("b", 10)
    s.add(second)
    s.schedule()
    assert set(second.slots) == slots


def test_a_full_queue_rejects_requests_until_one_is_admitted() -> None:
    s = make_scheduler(max_num_seqs=1, max_waiting=2)
    for name in "abc":  # the first does not count as waiting: the next step admits it
        s.add(make_request(name))
    with pytest.raises(Overloaded):
        s.add(make_request("d"))
    s.schedule()
    s.release(s.running[0])
    s.add(make_request("d"))
    assert [w.id for w in s.waiting] == ["b", "c", "d"]


@pytest.mark.parametrize(
    ("prompt", "max_tokens", "params"),
    [
        pytest.param(65, 1, {}, id="one answer"),
        pytest.param(66, 9, {"n": 2}, id="two samples"),
        pytest.param(70, 9, {"num_beams": 4}, id="four beams"),
    ],
)
def test_a_prompt_that_can_never_fit_is_rejected(
    prompt: int, max_tokens: int, params: dict[str, int]
) -> None:
    s = make_scheduler(slots=64)
    with pytest.raises(ContextLengthExceeded) as error:
        s.add(make_request("a", prompt, max_tokens=max_tokens, **params))
    assert error.value.param == "prompt"
    assert not s.has_work


@pytest.mark.parametrize(
    ("prompt", "params", "most"),
    [
        pytest.param(64, {}, 1, id="no slot left for a second token"),
        pytest.param(1, {}, 64, id="one answer"),
        pytest.param(30, {"n": 2}, 18, id="two samples"),
        pytest.param(31, {"n": 2}, 17, id="two samples, a slot left over"),
        pytest.param(30, {"num_beams": 4}, 9, id="four beams"),
    ],
)
@pytest.mark.parametrize("above", [1, 2000])
def test_an_answer_that_can_never_fit_is_cut(
    prompt: int, params: dict[str, int], most: int, above: int
) -> None:
    simulation = Simulation(make_scheduler(slots=64), 4, 8)
    request = simulation.add(prompt, most + above, **params)
    assert request.params.max_tokens == most
    assert request.slots_needed <= 64 < request.slots_needed + request.width
    simulation.finish()
    simulation.check_answers()


def test_a_cut_answer_that_would_be_too_short_is_rejected() -> None:
    s = make_scheduler(slots=64)
    with pytest.raises(InvalidRequest, match="35 tokens that 64 KV slots can hold") as error:
        s.add(make_request("a", 30, max_tokens=99, min_tokens=36))
    assert error.value.param == "min_tokens"
    assert not s.has_work
    s.add(make_request("a", 30, max_tokens=99, min_tokens=35))


@pytest.mark.parametrize(
    ("prompt", "max_tokens", "params"),
    [
        pytest.param(60, 5, {}, id="one answer"),
        pytest.param(30, 18, {"n": 2}, id="two samples"),
        pytest.param(30, 18, {"num_beams": 2}, id="two beams"),
    ],
)
def test_a_request_that_fits_exactly_is_served(
    prompt: int, max_tokens: int, params: dict[str, int]
) -> None:
    simulation = Simulation(make_scheduler(slots=64), 4, 8)
    assert simulation.add(prompt, max_tokens, **params).slots_needed == 64
    simulation.finish()
    simulation.check_answers()
