"""Continuous batching: requests join and leave at every step.

Synchronous and single-threaded; `loop.py` runs it in a thread. It knows nothing of asyncio, Ray or
HTTP, nor of torch: logits pass from the runner to the sampler unseen.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any, Protocol

from blip2_serve.engine.answer import Answer
from blip2_serve.engine.beam import BeamSearch, Candidate
from blip2_serve.engine.detokenizer import Decode
from blip2_serve.engine.scheduler import Admission, Plan, Scheduler
from blip2_serve.engine.sequence import Chunk, Request, Sequence
from blip2_serve.types import FinishReason, TokenEvent, TokenLogprob

Event = tuple[str, TokenEvent]  # request id, and what is new


class Runner(Protocol):
    def run(self, chunks: list[Chunk]) -> Any: ...


class Choice(Protocol):
    @property
    def token(self) -> int: ...
    @property
    def logprob(self) -> TokenLogprob | None: ...


class Sampler(Protocol):
    def choose(
        self, logits: Any, rows: list[int], sequences: list[Sequence]
    ) -> Callable[[], Iterable[Choice]]: ...
    def expand(
        self, logits: Any, rows: list[int], beams: list[Sequence], count: int
    ) -> Callable[[], list[Candidate]]: ...


@dataclass(frozen=True)
class EngineStats:
    """Gauges at one moment, and totals since the start."""

    running: int  # sequences
    waiting: int  # requests
    kv_slots_used: int  # held by requests or cached
    kv_slots_cached: int  # kept for later requests, whether held or not
    kv_slots_total: int
    kv_slots_needed: int  # by all running requests, counting shared slots once per request
    steps: int  # total
    cached_tokens: int  # total of prompt tokens whose keys and values were cached


@dataclass(frozen=True)
class StepReport:
    """What a step computed."""

    admitted: tuple[Admission, ...]
    prefills: int  # sequences with a chunk of their prompt in the step
    decodes: int  # sequences that advanced by one token
    tokens: int  # of prompts and answers together

    @classmethod
    def of(cls, plan: Plan) -> StepReport:
        decodes = sum(bool(chunk.sequence.output) for chunk in plan.chunks)
        tokens = sum(chunk.end - chunk.start for chunk in plan.chunks)
        return cls(plan.admitted, len(plan.chunks) - decodes, decodes, tokens)

    @property
    def phase(self) -> str:
        return "decode" if not self.prefills else "mixed" if self.decodes else "prefill"


@dataclass(frozen=True)
class StepResult:
    events: list[Event]
    report: StepReport


@dataclass
class _Live:
    """A request under way, with its answers so far."""

    request: Request
    answers: list[Answer]
    search: BeamSearch | None = None


class Engine:
    """One step at a time: the scheduler plans, the runner computes, the sampler picks tokens.

    `decode` turns token ids into text without special tokens; `eos_token_ids` end an answer.
    """

    def __init__(
        self,
        runner: Runner,
        scheduler: Scheduler,
        sampler: Sampler,
        *,
        decode: Decode,
        eos_token_ids: tuple[int, ...],
    ) -> None:
        self._runner = runner
        self._scheduler = scheduler
        self._sampler = sampler
        self._decode = decode
        self._eos = frozenset(eos_token_ids)
        self._live: dict[str, _Live] = {}
        self._steps = 0

    @property
    def has_work(self) -> bool:
        return self._scheduler.has_work

    def stats(self) -> EngineStats:
        s = self._scheduler
        return EngineStats(
            running=sum(len(request.sequences) for request in s.running),
            waiting=len(s.waiting),
            kv_slots_used=s.kv.used,
            kv_slots_cached=s.cached.slots,
            kv_slots_total=s.kv.total,
            kv_slots_needed=sum(request.slots_needed for request in s.running),
            steps=self._steps,
            cached_tokens=s.cached_tokens,
        )

    def add(self, request: Request) -> None:
        """Queues a request; raises as `Scheduler.add` does."""
        self._scheduler.add(request)
        answers = [Answer(request, index, self._decode) for index in range(request.params.n)]
        search = None
        if request.params.num_beams > 1:
            search = BeamSearch(request, self._ends(request))
        self._live[request.id] = _Live(request, answers, search)

    def abort(self, request_id: str) -> None:
        """Drops a request; does nothing if it has ended already."""
        if live := self._live.pop(request_id, None):
            self._scheduler.release(live.request)

    def step(self) -> StepResult:
        """Runs one step and returns what is new in each answer."""
        plan = self._scheduler.schedule()
        report = StepReport.of(plan)
        logits = self._runner.run(plan.chunks)
        self._scheduler.advance(plan.chunks)
        self._steps += 1
        ready = [chunk.sequence for chunk in plan.chunks if chunk.completes]
        return StepResult([*self._choose(logits, ready), *self._search(logits, ready)], report)

    def check_integrity(self) -> None:
        """Asserts what must hold between steps."""
        self._scheduler.check_integrity()
        held = {r.id for r in [*self._scheduler.running, *self._scheduler.waiting]}
        assert held == self._live.keys()

    def check_idle(self) -> None:
        """Asserts, cheaply, that nothing is held while there is no work."""
        assert self._scheduler.kv.used == self._scheduler.cached.slots
        assert not self._live

    def _choose(self, logits: Any, ready: list[Sequence]) -> Iterator[Event]:
        """Picks one token for every sequence that is not a beam."""
        rows, sequences = [], []
        for row, sequence in enumerate(ready):
            if sequence.request.params.num_beams == 1:
                samples = _samples(sequence)
                sequences += samples
                rows += [row] * len(samples)
        if not sequences:
            return
        for sequence, choice in zip(
            sequences, self._sampler.choose(logits, rows, sequences)(), strict=True
        ):
            yield sequence.request.id, self._append(sequence, choice)

    def _append(self, sequence: Sequence, choice: Choice) -> TokenEvent:
        request = sequence.request
        reason: FinishReason | None = None
        if choice.token in self._ends(request):
            reason = "stop"
        elif len(sequence.output) + 1 == request.params.max_tokens:
            reason = "length"
        answer = self._live[request.id].answers[sequence.index]
        event = answer.add([choice.token], [choice.logprob] if choice.logprob else [], reason)
        if event.finish_reason is None:
            sequence.append(choice.token)
            return event
        self._scheduler.end(sequence)
        if request.sequences:
            return event
        del self._live[request.id]
        return replace(event, last=True)

    def _search(self, logits: Any, ready: list[Sequence]) -> Iterator[Event]:
        """Advances every beam search by one step."""
        searching: dict[str, list[int]] = {}
        for row, sequence in enumerate(ready):
            if sequence.request.params.num_beams > 1:
                searching.setdefault(sequence.request.id, []).append(row)
        for request_id, rows in searching.items():
            live = self._live[request_id]
            assert live.search is not None
            beams = [ready[row] for row in rows]
            candidates = self._sampler.expand(logits, rows, beams, live.search.candidates)()
            live.request.sequences = live.search.step(candidates)
            for event in self._beam_events(live, live.search):
                yield request_id, event

    def _beam_events(self, live: _Live, search: BeamSearch) -> list[TokenEvent]:
        beams = live.request.sequences
        best = search.hypotheses[0] if not beams else None
        if live.request.params.n == 1:
            tokens, logprobs = search.newly_agreed(beams)
            event = live.answers[0].add(tokens, logprobs, best.reason if best else None)
            if event.finish_reason is None:
                return [event] if tokens else []
            events = [event]
        elif best:
            events = [
                answer.add(h.tokens, h.logprobs, h.reason)
                for answer, h in zip(live.answers, search.hypotheses, strict=False)
            ]
        else:
            return []
        # The search is over, or a stop string ended all beams at once.
        live.request.sequences = [best.beam if best else beams[0]]
        self._scheduler.end(live.request.sequences[0])
        del self._live[live.request.id]
        return [*events[:-1], replace(events[-1], last=True)]

    def _ends(self, request: Request) -> frozenset[int]:
        return frozenset() if request.params.ignore_eos else self._eos


def _samples(sequence: Sequence) -> list[Sequence]:
    """The sequence itself, or its n samples if its prefill has just finished."""
    request = sequence.request
    if request.params.n > 1 and not sequence.output:
        request.sequences = [sequence.fork(index) for index in range(request.params.n)]
        return request.sequences.copy()
    return [sequence]
