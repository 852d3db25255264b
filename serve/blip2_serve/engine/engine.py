"""Continuous batching: requests join and leave at every step.

Synchronous and single-threaded; `loop.py` gives it a thread. It knows no asyncio, Ray or HTTP, and
no torch either: logits pass from runner to sampler unseen.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any, Protocol

from blip2_serve.engine.answer import Answer
from blip2_serve.engine.beam import BeamSearch, Candidate
from blip2_serve.engine.detokenizer import Decode
from blip2_serve.engine.scheduler import Admission, Scheduler
from blip2_serve.engine.sequence import Chunk, Request, Sequence
from blip2_serve.types import FinishReason, TokenEvent, TokenLogprob

Event = tuple[str, TokenEvent]  # of the request of that id


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
    ) -> Iterable[Choice]: ...
    def expand(
        self, logits: Any, rows: list[int], beams: list[Sequence], count: int
    ) -> list[Candidate]: ...


@dataclass(frozen=True)
class EngineStats:
    """Sequences and KV rows at one moment; steps and tokens since the start."""

    running: int
    waiting: int
    kv_slots_used: int  # by requests, or by what is kept of them
    kv_slots_cached: int  # of earlier requests, for later ones
    kv_slots_total: int
    kv_slots_needed: int  # that running requests can come to, shared ones counted for each
    steps: int
    cached_tokens: int  # of prompts, whose KV was there already


@dataclass(frozen=True)
class StepReport:
    """What a step did."""

    admitted: tuple[Admission, ...]
    prompts: int  # sequences of which a piece of the prompt was computed
    decodes: int  # sequences that got one token further
    tokens: int  # computed, of prompts and answers

    @property
    def phase(self) -> str:
        return "decode" if not self.prompts else "mixed" if self.decodes else "prefill"


@dataclass
class _Live:
    """A request and what is known of its answers."""

    request: Request
    answers: list[Answer]
    search: BeamSearch | None = None


class Engine:
    """`runner` computes, `scheduler` chooses, `sampler` picks; all three are handed in."""

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
        self.last_step = StepReport((), 0, 0, 0)

    @property
    def has_work(self) -> bool:
        return self._scheduler.has_work

    def stats(self) -> EngineStats:
        s = self._scheduler
        running = sum(len(request.sequences) for request in s.running)
        kept = s.cached.slots
        return EngineStats(
            running=running,
            waiting=len(s.waiting),
            kv_slots_used=s.kv.used,
            kv_slots_cached=kept,
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
        """Drops a request; one that has ended already is no error."""
        if live := self._live.pop(request_id, None):
            self._scheduler.release(live.request)

    def step(self) -> list[Event]:
        """One step: what is new of every answer, by request id."""
        chunks = self._scheduler.schedule()
        decodes = sum(bool(chunk.sequence.output) for chunk in chunks)
        self.last_step = StepReport(
            admitted=tuple(self._scheduler.admitted),
            prompts=len(chunks) - decodes,
            decodes=decodes,
            tokens=sum(chunk.end - chunk.start for chunk in chunks),
        )
        logits = self._runner.run(chunks)
        self._scheduler.advance(chunks)
        self._steps += 1
        ready = [chunk.sequence for chunk in chunks if chunk.completes]
        return [*self._choose(logits, ready), *self._search(logits, ready)]

    def check_integrity(self) -> None:
        """Asserts what must hold between steps."""
        self._scheduler.check_integrity()
        held = {r.id for r in [*self._scheduler.running, *self._scheduler.waiting]}
        assert held == self._live.keys()

    def check_idle(self) -> None:
        """Asserts, at little cost, that nothing is held while there is no work."""
        assert self._scheduler.kv.used == self._scheduler.cached.slots
        assert not self._live

    def _choose(self, logits: Any, ready: list[Sequence]) -> Iterator[Event]:
        """One token for every sequence that is not a beam."""
        rows, sequences = [], []
        for row, sequence in enumerate(ready):
            if sequence.request.params.num_beams == 1:
                samples = _samples(sequence)
                sequences += samples
                rows += [row] * len(samples)
        if not sequences:
            return
        for sequence, choice in zip(
            sequences, self._sampler.choose(logits, rows, sequences), strict=True
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
        """One step of every beam search."""
        searching: dict[str, list[int]] = {}
        for row, sequence in enumerate(ready):
            if sequence.request.params.num_beams > 1:
                searching.setdefault(sequence.request.id, []).append(row)
        for request_id, rows in searching.items():
            live = self._live[request_id]
            assert live.search is not None
            beams = [ready[row] for row in rows]
            candidates = self._sampler.expand(logits, rows, beams, live.search.candidates)
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
        # The search is over, or a stop string ended all beams alike.
        live.request.sequences = [best.beam if best else beams[0]]
        self._scheduler.end(live.request.sequences[0])
        del self._live[live.request.id]
        return [*events[:-1], replace(events[-1], last=True)]

    def _ends(self, request: Request) -> frozenset[int]:
        return frozenset() if request.params.ignore_eos else self._eos


def _samples(sequence: Sequence) -> list[Sequence]:
    """The sequence or, where its prompt has just been computed, as many as there are samples."""
    request = sequence.request
    if request.params.n > 1 and not sequence.output:
        request.sequences = [sequence.fork(index) for index in range(request.params.n)]
        return request.sequences.copy()
    return [sequence]
