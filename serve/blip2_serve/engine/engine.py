"""Continuous batching: requests join and leave at every step.

Synchronous and single-threaded; `loop.py` runs it in a thread. It knows nothing of asyncio, Ray or
HTTP, nor of torch: logits pass from the runner to the sampler unseen.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any

from blip2_serve.engine.beam import Candidate, Line
from blip2_serve.engine.detokenizer import Decode
from blip2_serve.engine.live import Live, check_sent
from blip2_serve.engine.scheduler import Admission, Scheduler
from blip2_serve.engine.sequence import Chunk, Request, Sequence
from blip2_serve.engine.step import (
    NO_NUMBERS,
    Choice,
    EngineStats,
    Event,
    Failure,
    Runner,
    Sampler,
    StepReport,
    StepResult,
)
from blip2_serve.errors import Blip2ServeError, TimedOut, Unavailable
from blip2_serve.types import Beam, FinishReason, TokenLogprob


@dataclass(frozen=True)
class _Launched:
    """A step that the device is computing."""

    chunks: list[Chunk]
    report: StepReport
    forks: list[tuple[Sequence, list[Sequence]]]  # prompts, with the samples that continue them
    chosen_for: list[Sequence]
    choices: Callable[[], Iterable[Choice]]
    searches: list[tuple[Live, list[Sequence], Callable[[], list[Candidate]]]]


@dataclass(slots=True)  # frozen ones take three times as long to make
class _News:
    """New tokens of an answer, not yet text."""

    live: Live
    index: int  # of the answer
    sequence: Sequence  # the answer's, or one of the beams
    tokens: list[int]
    logprobs: Iterable[TokenLogprob]
    reason: FinishReason | None
    lines: Iterable[Line] = ()  # of a search that is shown


class Engine:
    """One step at a time: the scheduler plans, the runner computes, the sampler picks tokens.

    `decode` turns token ids into text without special tokens; `eos_token_ids` end an answer.
    `asynchronous` says that the runner only launches work and the sampler's results wait for it.
    `clock` tells the seconds that `Request.expires` is compared with.
    """

    def __init__(
        self,
        runner: Runner,
        scheduler: Scheduler,
        sampler: Sampler,
        *,
        decode: Decode,
        eos_token_ids: tuple[int, ...],
        asynchronous: bool = False,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self._runner = runner
        self._scheduler = scheduler
        self._sampler = sampler
        self._decode = decode
        self._eos = frozenset(eos_token_ids)
        self._asynchronous = asynchronous
        self._clock = clock
        self._next_expiry = math.inf  # no request expires before that
        self._live: dict[str, Live] = {}
        self._ended: list[Event] = []  # of resumed answers that had nothing left to compute
        self._failures: list[Failure] = []
        self._launched: _Launched | None = None
        self._steps = 0
        self.without_numbers = 0  # requests in a row whose logits were not finite

    @property
    def has_work(self) -> bool:
        return bool(self._launched or self._scheduler.has_work or self._ended)

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
        """Queues a request; raises as `Scheduler.add` does, and InvalidRequest for its `sent`."""
        check_sent(request)
        self._scheduler.add(request)
        ends = frozenset[int]() if request.params.ignore_eos else self._eos
        live = self._live[request.id] = Live(request, self._decode, ends)
        if request.expires is not None:
            self._next_expiry = min(self._next_expiry, request.expires)
        events = live.resume() if request.sent else []
        if not live.unfinished:
            self.abort(request.id)
            events[-1] = replace(events[-1], last=True)
        self._ended += [(request.id, event) for event in events]

    def abort(self, request_id: str) -> None:
        """Drops a request; does nothing if it has ended already."""
        if live := self._live.pop(request_id, None):
            self._scheduler.release(live.request)

    def step(self) -> StepResult:
        """Takes the tokens of the step under way, launches the next, and returns what is new.

        Requests whose time is over end with TimedOut before that, whether they run or wait.
        So the device computes while this thread turns tokens into text. A runner that is not
        asynchronous has computed a step once it is launched: its tokens are taken at once.
        """
        self._expire()
        report, news = self._collect()
        admitted = self._launch()
        if not self._asynchronous:
            report, news = self._collect()
        ended, self._ended = self._ended, []
        events = [*ended, *self._events(news)]
        failures, self._failures = self._failures, []
        return StepResult(events, report, admitted, failures)

    def check_integrity(self) -> None:
        """Asserts what must hold between steps."""
        self._scheduler.check_integrity()
        held = {r.id for r in [*self._scheduler.running, *self._scheduler.waiting]}
        assert held == self._live.keys()

    def check_idle(self) -> None:
        """Asserts, cheaply, that nothing is held while there is no work."""
        assert self._scheduler.kv.used == self._scheduler.cached.slots
        assert not self._live

    def _fail(self, live: Live, error: Blip2ServeError) -> None:
        """Drops a request that has no answer."""
        self.abort(live.request.id)
        self._failures.append((live.request.id, error))

    def _expire(self) -> None:
        now = self._clock()
        if now < self._next_expiry:
            return
        self._next_expiry = math.inf
        for live in [*self._live.values()]:
            expires = live.request.expires
            if expires is None:
                continue
            if expires <= now:
                self._fail(live, TimedOut("the time of the request was over before its answer"))
            else:
                self._next_expiry = min(self._next_expiry, expires)

    # -- launching a step ----------------------------------------------------------------------

    def _launch(self) -> tuple[Admission, ...]:
        """Launches the next step, if there is work. Returns the requests that it admits."""
        if not self._scheduler.has_work:
            return ()
        plan = self._scheduler.schedule()
        logits = self._runner.run(plan.chunks)
        ready = [chunk.sequence for chunk in plan.chunks if chunk.completes]
        rows, sequences, forks = [], [], []
        searches: dict[str, list[int]] = {}
        for row, sequence in enumerate(ready):
            params = sequence.request.params
            if params.num_beams > 1:
                searches.setdefault(sequence.request.id, []).append(row)
                continue
            samples = [sequence]
            if (params.n > 1 or sequence.request.sent) and not sequence.output:
                samples = sequence.request.samples()
                forks.append((sequence, samples))
                samples = [s for s in samples if not s.output]  # the others have more to compute
            rows += [row] * len(samples)
            sequences += samples
        self._launched = _Launched(
            plan.chunks,
            StepReport.of(plan),
            forks,
            sequences,
            self._sampler.choose(logits, rows, sequences) if sequences else list,
            [self._expand(logits, own, ready) for own in searches.values()],
        )
        self._steps += 1
        return plan.admitted

    def _expand(
        self, logits: Any, rows: list[int], ready: list[Sequence]
    ) -> tuple[Live, list[Sequence], Callable[[], list[Candidate]]]:
        beams = [ready[row] for row in rows]
        live = self._live[beams[0].request.id]
        assert live.search is not None
        return live, beams, self._sampler.expand(logits, rows, beams, live.search.candidates)

    # -- taking its tokens ---------------------------------------------------------------------

    def _collect(self) -> tuple[StepReport | None, list[_News]]:
        """Waits for the step under way and advances the sequences it computed.

        Sequences that have ended since it was launched, by an abort or a stop string, are left
        out. Their KV slots may be others' by now: steps are computed in order.
        """
        step, self._launched = self._launched, None
        if step is None:
            return None, []
        choices = [*step.choices()]
        found = [candidates() for _, _, candidates in step.searches]
        living = [chunk for chunk in step.chunks if _lives(chunk.sequence)]
        for sequence, samples in step.forks:
            if _lives(sequence):
                sequence.request.sequences = [*samples]
        self._fail_without_numbers(step, choices, found)
        # Not those that have just failed: their keys and values must not be cached.
        self._scheduler.advance([c for c in living if c.sequence.request.sequences])
        news = [
            self._append(sequence, choice)
            for sequence, choice in zip(step.chosen_for, choices, strict=True)
            if _lives(sequence)
        ]
        for (live, beams, _), candidates in zip(step.searches, found, strict=True):
            if _lives(beams[0]):
                news += self._search(live, candidates)
        return step.report, news

    def _fail_without_numbers(
        self, step: _Launched, choices: list[Choice], found: list[list[Candidate]]
    ) -> None:
        """Drops requests whose logits are not finite. They cache nothing, and harm no others."""
        pairs = zip(step.chosen_for, choices, strict=True)
        bad = [sequence for sequence, choice in pairs if choice.token == NO_NUMBERS]
        bad += [b[0] for (_, b, _), ok in zip(step.searches, found, strict=True) if not ok]
        if len(bad) < len(step.chosen_for) + len(found):
            self.without_numbers = 0
        for sequence in bad:
            if _lives(sequence):
                self.without_numbers += 1
                message = "the model computed no finite numbers for this request"
                self._fail(self._live[sequence.request.id], Blip2ServeError(message))

    def _append(self, sequence: Sequence, choice: Choice) -> _News:
        request = sequence.request
        live = self._live[request.id]
        reason: FinishReason | None = None
        if choice.token in live.ends:
            reason = "stop"
        elif len(sequence.output) + 1 == request.params.max_tokens:
            reason = "length"
        if reason:
            self._scheduler.end(sequence)
        else:
            sequence.append(choice.token)
        logprobs = [choice.logprob] if choice.logprob else []
        return _News(live, sequence.index, sequence, [choice.token], logprobs, reason)

    def _search(self, live: Live, candidates: list[Candidate]) -> list[_News]:
        """Advances a beam search by one step."""
        request, search = live.request, live.search
        assert search is not None
        request.sequences = beams = search.step(candidates)
        best = None if beams else search.hypotheses[0]
        if best:
            request.sequences = [best.beam]
        first = best.beam if best else beams[0]
        found: list[tuple[int, Sequence, list[int], list[TokenLogprob], FinishReason | None]] = []
        if request.params.n == 1:
            found = [(0, first, *search.newly_agreed(beams), best.reason if best else None)]
        elif best:
            found = [
                (index, h.beam, h.tokens, h.logprobs, h.reason)
                for index, h in enumerate(search.hypotheses[: request.params.n])
                if not live.is_finished(index)
            ]
        try:
            news = [
                _News(live, index, beam, *live.unsent(index, tokens, logprobs), reason)
                for index, beam, tokens, logprobs, reason in found
            ]
        except Unavailable as error:
            self._fail(live, error)
            return []
        if request.params.show_beams:
            # First: the last event of a request is an answer's.
            news.insert(0, _News(live, 0, first, [], [], None, search.lines(beams)))
        if best:
            self._scheduler.end(best.beam)
        return news

    # -- text ----------------------------------------------------------------------------------

    def _events(self, news: list[_News]) -> Iterator[Event]:
        """Turns new tokens into text; a stop string in it ends its answer."""
        for new in news:
            live, request = new.live, new.live.request
            event = live.answers[new.index].add(new.tokens, [*new.logprobs], new.reason)
            if event.finish_reason is None:
                if new.lines:
                    event = replace(event, beams=self._beams(new.lines))
                if new.tokens or new.lines:
                    yield request.id, event
                continue
            if new.reason is None:
                if live.search:
                    request.sequences = [new.sequence]
                self._scheduler.end(new.sequence)
            live.unfinished -= 1
            if not live.unfinished:
                del self._live[request.id]
                event = replace(event, last=True)
            yield request.id, event

    def _beams(self, lines: Iterable[Line]) -> tuple[Beam, ...]:
        return tuple(Beam(self._decode(tokens), score, ended) for tokens, score, ended in lines)


def _lives(sequence: Sequence) -> bool:
    return sequence in sequence.request.sequences
