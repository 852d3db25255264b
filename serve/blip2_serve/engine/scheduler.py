"""Which tokens the next step computes. Pure Python on ints: no torch, no text, no clock.

First come, first served. A sequence is admitted once all the KV rows that it can ever reach are
free, so a running sequence never waits for memory and is never preempted. Each step decodes one
token of every sequence that is past its prompt, and spends what is left of `max_step_tokens` on
prompts, in chunks: however long a prompt is, the others wait for one bounded step only.
"""

from __future__ import annotations

from array import array
from collections import deque

from blip2_serve.engine.kv import KvRows
from blip2_serve.engine.sequence import Chunk, Sequence
from blip2_serve.errors import ContextLengthExceeded, Overloaded
from blip2_serve.types import FinishReason


class Scheduler:
    def __init__(
        self, kv: KvRows, *, max_running: int, max_waiting: int, max_step_tokens: int
    ) -> None:
        assert (
            max_step_tokens > max_running
        )  # or prompts would starve; the configuration sees to it
        self.kv = kv
        self.waiting: deque[Sequence] = deque()
        self.running: list[Sequence] = []  # in order of admission
        self._max_running = max_running
        self._max_waiting = max_waiting
        self._max_step_tokens = max_step_tokens

    @property
    def has_work(self) -> bool:
        return bool(self.running or self.waiting)

    def add(self, sequence: Sequence) -> None:
        """Puts a sequence in the queue.

        Raises:
            ContextLengthExceeded: it can never fit into the KV.
            Overloaded: the queue is full.
        """
        if sequence.reach > self.kv.total:
            raise ContextLengthExceeded(
                f"prompt and max_tokens reach {sequence.reach} tokens; this server's KV has room "
                f"for {self.kv.total}",
                "max_tokens",
            )
        free_places = self._max_running - len(self.running)  # filled by the next step
        if len(self.waiting) >= self._max_waiting + free_places:
            raise Overloaded(f"{len(self.waiting)} requests are waiting already; try again later")
        self.waiting.append(sequence)

    def schedule(self) -> list[Chunk]:
        """The next step's work: decodes first, then prompts, oldest first."""
        self._admit()
        decoding = [s for s in self.running if s.computed == s.length - 1 and s.output]
        chunks = [Chunk(s, s.computed, s.length) for s in decoding]
        budget = self._max_step_tokens - len(chunks)
        for sequence in self.running:
            if not sequence.output and budget > 0:
                end = min(sequence.length, sequence.computed + budget)
                chunks.append(Chunk(sequence, sequence.computed, end))
                budget -= end - sequence.computed
        return chunks

    def advance(self, chunks: list[Chunk]) -> None:
        """Notes that the chunks' keys and values are in the KV."""
        for chunk in chunks:
            chunk.sequence.computed = chunk.end

    def release(self, sequence: Sequence, reason: FinishReason | None) -> None:
        """Takes a sequence out, running or waiting, finished or aborted (reason None)."""
        if sequence in self.waiting:
            self.waiting.remove(sequence)
        else:
            self.running.remove(sequence)
            self.kv.give_back(sequence.rows)
            sequence.rows = array("q")
        sequence.finish_reason = reason

    def check_integrity(self) -> None:
        """Asserts what must hold between steps."""
        self.kv.check_integrity([s.rows for s in self.running])
        for sequence in self.running:
            assert len(sequence.rows) == sequence.reach
            assert sequence.computed < sequence.length
        assert len(self.running) <= self._max_running
        assert not any(s.rows for s in self.waiting)

    def _admit(self) -> None:
        while self.waiting and len(self.running) < self._max_running:
            rows = self.kv.take(self.waiting[0].reach)
            if rows is None:
                return
            sequence = self.waiting.popleft()
            sequence.rows = rows
            self.running.append(sequence)
