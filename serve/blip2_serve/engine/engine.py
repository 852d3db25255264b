"""Continuous batching: requests join and leave at every step.

Synchronous and single-threaded; `loop.py` gives it a thread. It knows no asyncio, Ray or HTTP, and
no torch either: logits pass from runner to sampler unseen.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

from blip2_serve.engine.detokenizer import Decode, Detokenizer
from blip2_serve.engine.scheduler import Scheduler
from blip2_serve.engine.sequence import Chunk, Sequence
from blip2_serve.types import FinishReason, TokenEvent


class Runner(Protocol):
    def run(self, chunks: list[Chunk]) -> Any: ...


class Sampler(Protocol):
    def sample(self, logits: Any, sequences: list[Sequence]) -> list[int]: ...


@dataclass(frozen=True)
class EngineStats:
    """Sequences and KV rows at one moment, and steps since the start."""

    running: int
    waiting: int
    kv_rows_used: int
    kv_rows_total: int
    steps: int


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
        self._live: dict[str, tuple[Sequence, Detokenizer]] = {}
        self._steps = 0

    @property
    def has_work(self) -> bool:
        return self._scheduler.has_work

    def stats(self) -> EngineStats:
        s = self._scheduler
        return EngineStats(len(s.running), len(s.waiting), s.kv.used, s.kv.total, self._steps)

    def add(self, sequence: Sequence) -> None:
        """Queues a sequence; raises as `Scheduler.add` does."""
        self._scheduler.add(sequence)
        self._live[sequence.id] = (sequence, Detokenizer(self._decode, sequence.params.stop))

    def abort(self, sequence_id: str) -> None:
        """Drops a sequence; one that has ended already is no error."""
        if sequence_id in self._live:
            self._release(self._live[sequence_id][0], None)

    def step(self) -> list[tuple[str, TokenEvent]]:
        """One step: the new token of every sequence that got one, by sequence id."""
        chunks = self._scheduler.schedule()
        logits = self._runner.run(chunks)
        self._scheduler.advance(chunks)
        ready = [chunk.sequence for chunk in chunks if chunk.completes]
        tokens = self._sampler.sample(logits, ready)
        self._steps += 1
        return [(s.id, self._append(s, t)) for s, t in zip(ready, tokens, strict=True)]

    def check_integrity(self) -> None:
        """Asserts what must hold between steps."""
        self._scheduler.check_integrity()
        held = {s.id for s in [*self._scheduler.running, *self._scheduler.waiting]}
        assert held == self._live.keys()

    def check_idle(self) -> None:
        """Asserts, at no cost, that nothing is held while there is no work."""
        assert self._scheduler.kv.used == 0
        assert not self._live

    def _append(self, sequence: Sequence, token: int) -> TokenEvent:
        params = sequence.params
        detokenizer = self._live[sequence.id][1]
        sequence.output.append(token)
        text = ""
        reason: FinishReason | None = None
        if token in self._eos and not params.ignore_eos:
            reason = "stop"
        else:
            text = detokenizer.push(token, may_stop=len(sequence.output) >= params.min_tokens)
            if detokenizer.stopped:
                reason = "stop"
            elif len(sequence.output) == params.max_tokens:
                reason = "length"
        if reason:
            text += detokenizer.close()
            if detokenizer.stopped:  # maybe only by the very last half of a character
                reason = "stop"
            self._release(sequence, reason)
        return TokenEvent((token,), text, reason, len(sequence.prompt))

    def _release(self, sequence: Sequence, reason: FinishReason | None) -> None:
        self._scheduler.release(sequence, reason)
        del self._live[sequence.id]
