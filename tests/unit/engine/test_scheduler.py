from __future__ import annotations

from dataclasses import dataclass, field
from random import Random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from blip2_serve.engine.kv import KvRows
from blip2_serve.engine.scheduler import Scheduler
from blip2_serve.engine.sequence import Chunk, Sequence
from blip2_serve.errors import ContextLengthExceeded, Overloaded
from blip2_serve.types import SamplingParams


def scheduler(
    rows: int = 64, max_running: int = 4, max_waiting: int = 1000, max_step_tokens: int = 8
) -> Scheduler:
    return Scheduler(
        KvRows(rows),
        max_running=max_running,
        max_waiting=max_waiting,
        max_step_tokens=max_step_tokens,
    )


def sequence(name: str = "a", prompt: int = 1, max_tokens: int = 1) -> Sequence:
    return Sequence(name, [7] * prompt, None, SamplingParams(max_tokens=max_tokens))


def work(chunks: list[Chunk]) -> list[tuple[str, int, int]]:
    return [(c.sequence.id, c.start, c.end) for c in chunks]


@dataclass
class Simulation:
    """Drives a scheduler as the engine does, and checks what it promises after every step."""

    scheduler: Scheduler
    max_running: int
    max_step_tokens: int
    arrived: list[Sequence] = field(default_factory=list)
    ends_after: dict[str, int] = field(default_factory=dict)
    last_admitted: int = -1

    def add(self, prompt: int, max_tokens: int, ends_after: int) -> None:
        s = sequence(str(len(self.arrived)), prompt, max_tokens)
        self.scheduler.add(s)
        self.arrived.append(s)
        self.ends_after[s.id] = ends_after

    def abort(self, choice: int) -> None:
        held = [*self.scheduler.running, *self.scheduler.waiting]
        if held:
            self.scheduler.release(held[choice % len(held)], None)
            self.scheduler.check_integrity()

    def step(self) -> list[Chunk]:
        running = {s.id for s in self.scheduler.running}
        decoding = {s.id for s in self.scheduler.running if s.output}
        computed = {s.id: s.computed for s in [*self.scheduler.running, *self.scheduler.waiting]}
        chunks = self.scheduler.schedule()

        assert sum(c.end - c.start for c in chunks) <= self.max_step_tokens
        assert len({c.sequence.id for c in chunks}) == len(chunks)
        for chunk in chunks:
            assert chunk.start == computed[chunk.sequence.id] < chunk.end <= chunk.sequence.length
        single = {c.sequence.id for c in chunks if c.completes and c.end - c.start == 1}
        assert decoding <= single
        self._check_admission(running)

        self.scheduler.advance(chunks)
        for chunk in chunks:
            if chunk.completes:
                self._sample(chunk.sequence)
        self.scheduler.check_integrity()
        return chunks

    def finish(self) -> None:
        while self.scheduler.has_work:
            assert self.step(), "there is work, yet nothing was scheduled"
        assert self.scheduler.kv.used == 0

    def _check_admission(self, before: set[str]) -> None:
        for s in self.scheduler.running:
            if s.id not in before:
                assert int(s.id) > self.last_admitted
                self.last_admitted = int(s.id)
        if self.scheduler.waiting:
            first = self.scheduler.waiting[0]
            assert int(first.id) > self.last_admitted
            full = len(self.scheduler.running) == self.max_running
            assert full or first.reach > self.scheduler.kv.free

    def _sample(self, s: Sequence) -> None:
        s.output.append(9)
        if len(s.output) == s.params.max_tokens:
            self.scheduler.release(s, "length")
        elif len(s.output) >= self.ends_after[s.id]:
            self.scheduler.release(s, "stop")


actions = st.one_of(
    st.tuples(st.just("add"), st.integers(1, 15), st.integers(1, 10), st.integers(1, 12)),
    st.tuples(st.just("step")),
    st.tuples(st.just("abort"), st.integers(0, 100)),
)


@given(
    st.lists(actions, max_size=60),
    st.integers(24, 80),
    st.integers(1, 6),
    st.integers(1, 12),
)
def test_whatever_comes_and_goes_every_sequence_is_served_in_turn(
    plan: list[tuple[str, int]], rows: int, max_running: int, prompt_tokens: int
) -> None:
    max_step_tokens = max_running + prompt_tokens
    simulation = Simulation(
        scheduler(rows, max_running, max_step_tokens=max_step_tokens), max_running, max_step_tokens
    )
    for name, *arguments in plan:
        getattr(simulation, name)(*arguments)
    simulation.finish()

    for s in simulation.arrived:
        if s.finish_reason == "length":
            assert len(s.output) == s.params.max_tokens
        elif s.finish_reason == "stop":
            assert len(s.output) == simulation.ends_after[s.id]


def test_a_kv_with_room_for_few_serves_a_thousand_mixed_requests() -> None:
    random = Random(0)
    simulation = Simulation(scheduler(rows=50, max_running=8, max_step_tokens=16), 8, 16)
    for _ in range(1000):
        simulation.add(random.randint(1, 30), random.randint(1, 20), random.randint(1, 30))
    simulation.finish()
    assert all(s.finish_reason for s in simulation.arrived)


def test_the_others_get_a_token_in_every_step_of_a_long_prompt() -> None:
    simulation = Simulation(scheduler(rows=200, max_step_tokens=8), 4, 8)
    simulation.add(2, 50, 50)
    simulation.add(2, 50, 50)
    simulation.step()
    simulation.add(40, 1, 1)
    chunks = []
    while not simulation.arrived[2].output:
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
    s = scheduler(max_step_tokens=8)
    for name, prompt in [("a", 5), ("b", 5), ("c", 5)]:
        s.add(sequence(name, prompt))
    chunks = s.schedule()
    assert work(chunks) == [("a", 0, 5), ("b", 0, 3)]
    assert [c.completes for c in chunks] == [True, False]


def test_a_sequence_waits_until_its_whole_reach_is_free() -> None:
    s = scheduler(rows=20)
    first, second = sequence("a", 10, 3), sequence("b", 8, 2)  # reach 12 and 9
    s.add(first)
    s.add(second)
    assert work(s.schedule()) == [("a", 0, 8)]
    assert list(s.waiting) == [second]
    s.release(first, None)
    assert work(s.schedule()) == [("b", 0, 8)]


def test_a_short_request_does_not_overtake_a_long_one() -> None:
    s = scheduler(rows=20)
    for name, prompt in [("a", 15), ("long", 10), ("short", 1)]:
        s.add(sequence(name, prompt))
    s.schedule()
    assert [w.id for w in s.waiting] == ["long", "short"]


def test_no_more_run_than_allowed() -> None:
    s = scheduler(max_running=2)
    for name in "abc":
        s.add(sequence(name))
    assert work(s.schedule()) == [("a", 0, 1), ("b", 0, 1)]
    assert [w.id for w in s.waiting] == ["c"]


def test_the_last_token_needs_no_row() -> None:
    simulation = Simulation(scheduler(rows=6), 4, 8)
    simulation.add(4, 3, 3)
    simulation.finish()
    assert len(simulation.arrived[0].output) == 3


def test_rows_of_a_finished_sequence_are_reused_first() -> None:
    s = scheduler(rows=1000)
    first = sequence("a", 10)
    s.add(first)
    s.schedule()
    rows = set(first.rows)
    s.release(first, "length")
    second = sequence("b", 10)
    s.add(second)
    s.schedule()
    assert set(second.rows) == rows


def test_a_full_queue_turns_requests_away_until_one_is_admitted() -> None:
    s = scheduler(max_running=1, max_waiting=2)
    for name in "abc":  # the first will not wait: a place is free
        s.add(sequence(name))
    with pytest.raises(Overloaded):
        s.add(sequence("d"))
    s.schedule()
    s.release(s.running[0], None)
    s.add(sequence("d"))
    assert [w.id for w in s.waiting] == ["b", "c", "d"]


@pytest.mark.parametrize(
    ("prompt", "max_tokens"),
    [
        pytest.param(64, 2, id="a prompt of all rows and a second token"),
        pytest.param(65, 1, id="a prompt of more than all rows"),
        pytest.param(1, 65, id="more tokens than rows"),
    ],
)
def test_what_can_never_fit_is_refused(prompt: int, max_tokens: int) -> None:
    s = scheduler(rows=64)
    with pytest.raises(ContextLengthExceeded) as error:
        s.add(sequence("a", prompt, max_tokens))
    assert error.value.param == "max_tokens"
    assert not s.has_work


def test_what_just_fits_is_served() -> None:
    simulation = Simulation(scheduler(rows=64), 4, 8)
    simulation.add(60, 5, 5)
    simulation.finish()
    assert simulation.arrived[0].finish_reason == "length"
