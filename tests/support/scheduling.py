"""Drives the scheduler without a model."""

from __future__ import annotations

from dataclasses import dataclass, field
from random import Random
from typing import Any

from blip2_serve.engine.scheduler import Scheduler
from blip2_serve.engine.sequence import Chunk, Request, Sequence
from blip2_serve.engine.slots import KvSlots
from support.requests import make_request


def make_scheduler(
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
        sent: tuple[tuple[int, ...] | None, ...] = (),
        **params: Any,
    ) -> Request:
        name = str(len(self.arrived))
        request = make_request(name, prompt, digest=digest, max_tokens=max_tokens, **params)
        request.sent = sent
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
        assert {s for r in self.scheduler.running for s in r.sequences if s.decodes} <= single
        self._check_admission(running)

        self._compute(chunks)
        self.scheduler.advance(chunks)
        ready = [c.sequence for c in chunks if c.completes]
        for request in dict.fromkeys(sequence.request for sequence in ready):
            self._choose(request, [s for s in ready if s.request is request])
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
            if request.id not in self.answers:
                continue
            if request.sent:
                assert len(self.answers[request.id]) == sum(s is not None for s in request.sent)
            else:
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

    def _choose(self, request: Request, ready: list[Sequence]) -> None:
        if request.params.num_beams > 1:
            self._choose_beams(request)
            return
        if not ready[0].output:
            request.sequences = request.samples()
            ready = [sample for sample in request.sequences if not sample.output]
        for sequence in ready:
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
