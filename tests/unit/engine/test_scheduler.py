from __future__ import annotations

from dataclasses import dataclass, field
from random import Random
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from blip2_serve.engine.scheduler import Scheduler
from blip2_serve.engine.sequence import Chunk, Request, Sequence
from blip2_serve.engine.slots import KvSlots
from blip2_serve.errors import ContextLengthExceeded, InvalidRequest, Overloaded
from support.requests import make_request


def scheduler(
    slots: int = 64,
    max_num_seqs: int = 4,
    max_waiting: int = 1000,
    max_num_batched_tokens: int = 8,
    prefix_caching: bool = True,
) -> Scheduler:
    return Scheduler(
        KvSlots(slots),
        max_num_seqs=max_num_seqs,
        max_waiting=max_waiting,
        max_num_batched_tokens=max_num_batched_tokens,
        prefix_caching=prefix_caching,
    )


def work(chunks: list[Chunk]) -> list[tuple[str, int, int]]:
    return [(c.sequence.request.id, c.start, c.end) for c in chunks]


@dataclass
class Simulation:
    """Drives a scheduler as the engine does, and checks its promises after every step.

    `memory` models the KV cache: each slot has its token, all tokens before it, and the image.
    """

    scheduler: Scheduler
    max_num_seqs: int
    max_num_batched_tokens: int
    random: Random = field(default_factory=lambda: Random(0))
    arrived: list[Request] = field(default_factory=list)
    ends_after: dict[str, int] = field(default_factory=dict)
    answers: dict[str, list[list[int]]] = field(default_factory=dict)
    memory: dict[int, tuple[object, ...]] = field(default_factory=dict)
    last_admitted: int = -1

    def add(
        self,
        prompt: int | list[int],
        max_tokens: int,
        ends_after: int = 1000,
        *,
        digest: str = "picture",
        **params: Any,
    ) -> Request:
        name = str(len(self.arrived))
        request = make_request(name, prompt, digest=digest, max_tokens=max_tokens, **params)
        self.scheduler.add(request)
        self.arrived.append(request)
        self.ends_after[name] = ends_after
        self.answers[name] = []
        return request

    def abort(self, choice: int) -> None:
        held = [*self.scheduler.running, *self.scheduler.waiting]
        if held:
            request = held[choice % len(held)]
            self.scheduler.release(request)
            self.scheduler.check_integrity()
            self.answers.pop(request.id)

    def step(self) -> list[Chunk]:
        running = {r.id for r in self.scheduler.running}
        chunks = self.scheduler.schedule().chunks

        assert sum(c.end - c.start for c in chunks) <= self.max_num_batched_tokens
        assert len({c.sequence for c in chunks}) == len(chunks)
        for chunk in chunks:
            assert chunk.start == chunk.sequence.computed < chunk.end <= chunk.sequence.length
        single = {c.sequence for c in chunks if c.completes and c.end - c.start == 1}
        assert {s for r in self.scheduler.running for s in r.sequences if s.output} <= single
        self._check_admission(running)

        self._compute(chunks)
        self.scheduler.advance(chunks)
        for request in dict.fromkeys(c.sequence.request for c in chunks if c.completes):
            self._choose(request)
        self.scheduler.check_integrity()
        return chunks

    def finish(self) -> None:
        while self.scheduler.has_work:
            assert self.step(), "there is work, yet nothing was scheduled"
        kv, cached = self.scheduler.kv, self.scheduler.cached
        assert kv.used == cached.slots
        cached.make_room(kv.total)
        assert (kv.used, cached.slots) == (0, 0)

    def check_answers(self) -> None:
        """Asserts that all requests but the aborted ones got the right numbers of answers."""
        for request in self.arrived:
            if request.id in self.answers:
                longest = max(map(len, self.answers[request.id]))
                expected = min(request.params.max_tokens or 0, self.ends_after[request.id])
                assert longest == expected
                assert len(self.answers[request.id]) == request.params.n

    def _check_admission(self, before: set[str]) -> None:
        for request in self.scheduler.running:
            if request.id not in before:
                assert int(request.id) > self.last_admitted
                self.last_admitted = int(request.id)
        if self.scheduler.waiting:
            first = self.scheduler.waiting[0]
            assert int(first.id) > self.last_admitted
            width = sum(r.width for r in self.scheduler.running) + first.width
            assert width > self.max_num_seqs or first.slots_needed > self.scheduler.kv.free

    def _compute(self, chunks: list[Chunk]) -> None:
        for chunk in chunks:
            prefix: tuple[object, ...] = (chunk.sequence.request.digest,)
            for position in range(chunk.end):
                prefix = (hash(prefix), chunk.sequence.token_at(position))
                slot = chunk.sequence.slots[position]
                if position >= chunk.start:
                    self.memory[slot] = prefix
                assert self.memory[slot] == prefix, "KV of other tokens"

    def _choose(self, request: Request) -> None:
        if request.params.num_beams > 1:
            self._choose_beams(request)
            return
        if request.params.n > 1 and not request.sequences[0].output:
            request.sequences = [request.sequences[0].fork(i) for i in range(request.params.n)]
        for sequence in [*request.sequences]:
            token = self.random.randrange(3)
            # Staggered, so that the samples of a request end at different times.
            if self._ends(request, len(sequence.output) + 1 + sequence.index):
                self._end(sequence, [*sequence.output, token])
            else:
                sequence.append(token)

    def _choose_beams(self, request: Request) -> None:
        beams = request.sequences
        if self._ends(request, len(beams[0].output) + 1):
            for beam in self.random.choices(beams, k=request.params.n - 1):
                self.answers[request.id].append([*beam.output, 0])
            request.sequences = [self.random.choice(beams)]
            self._end(request.sequences[0], [*request.sequences[0].output, 0])
            return
        # Some beams fork, others end.
        parents = self.random.choices(beams, k=request.params.num_beams)
        request.sequences = [beam.fork(i) for i, beam in enumerate(parents)]
        for beam in request.sequences:
            beam.append(self.random.randrange(3))

    def _ends(self, request: Request, length: int) -> bool:
        return length >= min(request.params.max_tokens or 0, self.ends_after[request.id])

    def _end(self, sequence: Sequence, tokens: list[int]) -> None:
        self.answers[sequence.request.id].append(tokens)
        self.scheduler.end(sequence)


prompts = st.lists(st.integers(0, 1), min_size=1, max_size=15)
widths = st.sampled_from([{}, {}, {"n": 3}, {"num_beams": 2}, {"num_beams": 4, "n": 2}])
actions = st.one_of(
    st.tuples(
        st.just("add"), prompts, st.integers(1, 6), st.integers(1, 8), widths, st.sampled_from("xy")
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
    subject = scheduler(
        slots,
        max_num_seqs,
        max_num_batched_tokens=max_num_batched_tokens,
        prefix_caching=prefix_caching,
    )
    simulation = Simulation(subject, max_num_seqs, max_num_batched_tokens)
    for name, *arguments in plan:
        if name == "add":
            *arguments, params, digest = arguments
            simulation.add(*arguments, digest=digest, **params)
        else:
            getattr(simulation, name)(*arguments)
    simulation.finish()
    simulation.check_answers()


def test_a_thousand_requests_share_slots_for_sixteen() -> None:
    random = Random(0)
    typical = make_request(prompt=16, max_tokens=8, num_beams=3).slots_needed
    simulation = Simulation(scheduler(16 * typical, 24, max_num_batched_tokens=40), 24, 40)
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
    simulation = Simulation(scheduler(slots=200, max_num_batched_tokens=8), 4, 8)
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
    s = scheduler(max_num_batched_tokens=8)
    for name, prompt in [("a", 5), ("b", 5), ("c", 5)]:
        s.add(make_request(name, prompt))
    chunks = s.schedule().chunks
    assert work(chunks) == [("a", 0, 5), ("b", 0, 3)]
    assert [c.completes for c in chunks] == [True, False]


def test_a_request_waits_until_all_slots_it_needs_are_free() -> None:
    s = scheduler(slots=20)
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
    simulation = Simulation(scheduler(slots=10 + 3 * 4), 4, 8)
    request = simulation.add(10, 5, **params)
    assert request.slots_needed == 10 + 3 * 4
    simulation.step()
    assert simulation.scheduler.kv.free == 0
    simulation.finish()
    simulation.check_answers()


def test_a_short_request_does_not_overtake_a_long_one() -> None:
    s = scheduler(slots=20)
    for name, prompt in [("a", 15), ("long", 10), ("short", 1)]:
        s.add(make_request(name, prompt))
    s.schedule()
    assert [w.id for w in s.waiting] == ["long", "short"]


def test_at_most_max_num_seqs_run() -> None:
    s = scheduler(max_num_seqs=2)
    for name in "abc":
        s.add(make_request(name, 1))
    assert work(s.schedule().chunks) == [("a", 0, 1), ("b", 0, 1)]
    assert [w.id for w in s.waiting] == ["c"]


@pytest.mark.parametrize("name", ["n", "num_beams"])
def test_a_request_in_prefill_counts_all_its_future_sequences(name: str) -> None:
    s = scheduler(max_num_seqs=4)
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
    s = scheduler(max_num_seqs=4)
    with pytest.raises(InvalidRequest) as error:
        s.add(make_request("a", 1, **params))
    assert error.value.param == param
    assert "4" in str(error.value)
    assert not s.has_work


def test_the_last_token_needs_no_slot() -> None:
    simulation = Simulation(scheduler(slots=6), 4, 8)
    simulation.add(4, 3)
    simulation.finish()
    simulation.check_answers()


def test_slots_of_a_finished_request_are_reused_first() -> None:
    s = scheduler(slots=1000, prefix_caching=False)
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
    s = scheduler(max_num_seqs=1, max_waiting=2)
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
        pytest.param(64, 2, {}, id="no slot left for a second token"),
        pytest.param(65, 1, {}, id="prompt too long"),
        pytest.param(1, 65, {}, id="answer too long"),
        pytest.param(30, 19, {"n": 2}, id="two samples"),
        pytest.param(30, 19, {"num_beams": 2}, id="two beams"),
    ],
)
def test_a_request_that_can_never_fit_is_rejected(
    prompt: int, max_tokens: int, params: dict[str, int]
) -> None:
    s = scheduler(slots=64)
    with pytest.raises(ContextLengthExceeded) as error:
        s.add(make_request("a", prompt, max_tokens=max_tokens, **params))
    assert error.value.param == "max_tokens"
    assert not s.has_work


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
    simulation = Simulation(scheduler(slots=64), 4, 8)
    assert simulation.add(prompt, max_tokens, **params).slots_needed == 64
    simulation.finish()
    simulation.check_answers()


# -- prefix caching --------------------------------------------------------------------------------

PROMPT = [5, 1, 5, 2, 5, 3, 5, 4, 5, 5]


def served(*requests: dict[str, Any], prefix_caching: bool = True) -> Simulation:
    """Returns a simulation that has served these requests, one after the other."""
    simulation = Simulation(
        scheduler(200, max_num_batched_tokens=50, prefix_caching=prefix_caching), 4, 50
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
    simulation = Simulation(scheduler(200, max_num_batched_tokens=50), 4, 50)
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
    simulation = Simulation(scheduler(slots=20, max_num_batched_tokens=50), 4, 50)
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
    simulation = Simulation(scheduler(slots=40, max_num_batched_tokens=50), 4, 50)
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
    simulation = Simulation(scheduler(slots=60, max_num_batched_tokens=50), 4, 50)
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
