"""Which tokens the next step computes. Pure Python on ints: no torch, no text, no clock.

First come, first served. A request is admitted once every KV slot it can ever need is free, less
those of a prefix that is cached, so a running request never waits for memory and is never
preempted. Each step decodes one token of every sequence past its prompt and spends the rest of
`max_num_batched_tokens` on prefill, in chunks: however long a prompt is, it delays the others by
one bounded step.
"""

from __future__ import annotations

from array import array
from collections import deque
from dataclasses import dataclass

from blip2_serve.engine.prefix_tree import PrefixTree
from blip2_serve.engine.sequence import Chunk, Request, Sequence
from blip2_serve.engine.slots import KvSlots
from blip2_serve.errors import ContextLengthExceeded, InvalidRequest, Overloaded


@dataclass(frozen=True)
class Admission:
    """A request that waited and now runs."""

    request_id: str
    prompt_tokens: int
    cached_tokens: int  # of them, whose keys and values were there


class Scheduler:
    """`reuse`: keep the KV of what was computed, for requests that begin the same."""

    def __init__(
        self,
        kv: KvSlots,
        *,
        max_num_seqs: int,
        max_waiting: int,
        max_num_batched_tokens: int,
        prefix_caching: bool = True,
    ) -> None:
        assert (
            max_num_batched_tokens > max_num_seqs
        )  # or prompts would starve; the configuration sees to it
        self.kv = kv
        self.cached = PrefixTree(kv)
        self.waiting: deque[Request] = deque()
        self.running: list[Request] = []  # in order of admission
        self.admitted: list[Admission] = []  # by the last `schedule`
        self.cached_tokens = 0  # of prompts, since the start
        self._max_running = max_num_seqs  # sequences
        self._max_waiting = max_waiting  # requests
        self._max_step_tokens = max_num_batched_tokens
        self._prefix_caching = prefix_caching

    @property
    def has_work(self) -> bool:
        return bool(self.running or self.waiting)

    @property
    def running_sequences(self) -> int:
        """Counting those that a running request will have once its prompt is computed."""
        return sum(request.width for request in self.running)

    def add(self, request: Request) -> None:
        """Puts a request in the queue.

        Raises:
            ContextLengthExceeded: it can never fit into the KV.
            InvalidRequest: it has more beams or samples than ever run at once.
            Overloaded: the queue is full.
        """
        if request.slots_needed > self.kv.total:
            raise ContextLengthExceeded(
                f"prompt and max_tokens need {request.slots_needed} KV slots; this server has "
                f"{self.kv.total}",
                "max_tokens",
            )
        if request.width > self._max_running:
            raise InvalidRequest(
                f"this server generates at most {self._max_running} sequences at once",
                "num_beams" if request.params.num_beams > 1 else "n",
            )
        free_places = max(0, self._max_running - self.running_sequences)  # filled by the next step
        if len(self.waiting) >= self._max_waiting + free_places:
            raise Overloaded(f"{len(self.waiting)} requests are waiting already; try again later")
        self.waiting.append(request)

    def schedule(self) -> list[Chunk]:
        """The next step's work: decodes first, then prompts, oldest first."""
        self.admitted = []
        self._admit()
        sequences = [s for request in self.running for s in request.sequences]
        chunks = [Chunk(s, s.computed, s.length) for s in sequences if s.output]
        budget = self._max_step_tokens - len(chunks)
        for sequence in sequences:
            if not sequence.output and budget > 0:
                end = min(sequence.length, sequence.computed + budget)
                chunks.append(Chunk(sequence, sequence.computed, end))
                budget -= end - sequence.computed
        return chunks

    def advance(self, chunks: list[Chunk]) -> None:
        """Notes that the chunks' keys and values are in the KV."""
        for chunk in chunks:
            chunk.sequence.computed = chunk.end
            if chunk.completes and not chunk.sequence.output:
                self._cache(chunk.sequence)  # for requests that come while this one runs

    def end(self, sequence: Sequence) -> None:
        """Takes a sequence out; with its last sequence, a request gives back its slots."""
        request = sequence.request
        self._cache(sequence)
        request.sequences.remove(sequence)
        if not request.sequences:
            self.release(request)

    def release(self, request: Request) -> None:
        """Takes a request out, running or waiting."""
        if request in self.waiting:
            self.waiting.remove(request)
        else:
            self.running.remove(request)
            self.kv.release(request.slots)
        request.sequences, request.slots, request.unused = [], array("q"), array("q")

    def check_integrity(self) -> None:
        """Asserts what must hold between steps."""
        self.cached.check_integrity()
        self.kv.check_integrity((r.slots for r in self.running), self.cached.holdings())
        assert self.running_sequences <= self._max_running
        for request in self.running:
            assert len(request.slots) == request.slots_needed
            for sequence in request.sequences:
                assert len(sequence.slots) == sequence.length
                assert sequence.computed < sequence.length
                assert {*sequence.slots} <= {*request.slots}
        assert not any(request.slots for request in self.waiting)

    def _admit(self) -> None:
        while self.waiting:
            request = self.waiting[0]
            if self.running_sequences + request.width > self._max_running:
                return
            # Not the last token: its logits are needed, so it must be computed.
            known = self.cached.match(request.digest, request.prompt[:-1])
            missing = request.slots_needed - len(known)
            own = self.kv.allocate(missing) if self.cached.make_room(missing) else None
            if own is None:
                self.kv.release(known)
                return
            self.waiting.popleft()
            self.running.append(request)
            request.slots = known + own
            request.unused = request.slots[len(request.prompt) :]
            request.sequences = [
                Sequence(request, slots=request.slots[: len(request.prompt)], computed=len(known))
            ]
            self.admitted.append(Admission(request.id, len(request.prompt), len(known)))
            self.cached_tokens += len(known)

    def _cache(self, sequence: Sequence) -> None:
        if self._prefix_caching and sequence.computed:
            tokens = [*sequence.request.prompt, *sequence.output][: sequence.computed]
            self.cached.insert(sequence.request.digest, tokens, sequence.slots)
