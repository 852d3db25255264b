"""Which tokens the next step computes. Pure Python on ints: no torch, no text, no clock.

First come, first served. A request is admitted once every KV slot it can ever need is free, less
those of a cached prefix, so a running request never waits for memory and is never preempted. Each
step decodes one token of every sequence that has no more left, and spends the rest of
`max_num_batched_tokens` on prefill, in chunks: however long a prompt is, it delays the others by
one bounded step. The tokens that an answer is resumed after are computed like a prompt.
"""

from __future__ import annotations

from array import array
from collections import deque
from dataclasses import dataclass, replace

from blip2_serve.engine.prefix_tree import PrefixTree
from blip2_serve.engine.sequence import Chunk, Request, Sequence
from blip2_serve.engine.slots import KvSlots
from blip2_serve.errors import ContextLengthExceeded, InvalidRequest, Overloaded


@dataclass(frozen=True)
class Admission:
    """A request that left the queue and now runs."""

    request_id: str
    prompt_tokens: int
    cached_tokens: int  # prompt tokens whose keys and values were cached


@dataclass(frozen=True)
class Plan:
    """What the next step computes, and the requests it admits."""

    chunks: list[Chunk]
    decodes: int  # how many of them advance an answer by a token; they come first
    admitted: tuple[Admission, ...]


class Scheduler:
    """Queues requests, admits them into the KV cache and plans steps.

    `max_num_seqs` bounds the sequences that run at once and `max_num_batched_tokens` the tokens of
    a step; the second must be larger, or prefill would starve. `max_waiting` bounds the requests
    that wait. `prefix_caching` keeps the KV of finished requests for those that begin the same.
    """

    def __init__(
        self,
        kv: KvSlots,
        *,
        max_num_seqs: int,
        max_waiting: int,
        max_num_batched_tokens: int,
        prefix_caching: bool = True,
    ) -> None:
        assert max_num_batched_tokens > max_num_seqs
        self.kv = kv
        self.cached = PrefixTree(kv)
        self.waiting: deque[Request] = deque()
        self.running: list[Request] = []  # in order of admission
        self.cached_tokens = 0  # prompt tokens found in the cache since the start
        self._max_num_seqs = max_num_seqs
        self._max_waiting = max_waiting
        self._max_num_batched_tokens = max_num_batched_tokens
        self._prefix_caching = prefix_caching

    @property
    def has_work(self) -> bool:
        return bool(self.running or self.waiting)

    @property
    def running_sequences(self) -> int:
        """Counts the sequences that a request in prefill is going to have."""
        return sum(request.width for request in self.running)

    def add(self, request: Request) -> None:
        """Puts a request in the queue, with `max_tokens` cut to what the KV cache can ever hold.

        Raises:
            ContextLengthExceeded: its prompt can never fit into the KV cache.
            InvalidRequest: it has more beams or samples than ever run at once, or `min_tokens` is
                above what the KV cache can ever hold.
            Overloaded: the queue is full.
        """
        self._cut(request)
        if request.width > self._max_num_seqs:
            raise InvalidRequest(
                f"this server generates at most {self._max_num_seqs} sequences at once",
                "num_beams" if request.params.num_beams > 1 else "n",
            )
        idle = max(0, self._max_num_seqs - self.running_sequences)  # the next step fills these
        if len(self.waiting) >= self._max_waiting + idle:
            raise Overloaded(f"{len(self.waiting)} requests are waiting already; try again later")
        self.waiting.append(request)

    def _cut(self, request: Request) -> None:
        params = request.params
        # The last token of a sequence is never fed back, so it needs no slot.
        most = 1 + (self.kv.total - len(request.prompt)) // request.width
        if most < 1:
            raise ContextLengthExceeded(
                f"image and prompt need {len(request.prompt)} KV slots; this server has "
                f"{self.kv.total}: shorten the prompt",
                "prompt",
            )
        if params.min_tokens > most:
            raise InvalidRequest(
                f"min_tokens is above the {most} tokens that {self.kv.total} KV slots can hold",
                "min_tokens",
            )
        if request.slots_needed > self.kv.total:
            request.params = replace(params, max_tokens=most)

    def schedule(self) -> Plan:
        """Admits what fits and plans the next step: decodes first, then prefill, oldest first."""
        admitted = self._admit()
        sequences = [s for request in self.running for s in request.sequences]
        chunks = [
            Chunk(s, s.computed, length)
            for s in sequences
            if s.output and s.computed + 1 == (length := s.length)  # as `decodes`, but faster
        ]
        decodes = len(chunks)
        budget = self._max_num_batched_tokens - decodes
        for sequence in sequences if decodes < len(sequences) else ():
            if not sequence.decodes and budget > 0:
                end = min(sequence.length, sequence.computed + budget)
                chunks.append(Chunk(sequence, sequence.computed, end))
                budget -= end - sequence.computed
        return Plan(chunks, decodes, admitted)

    def advance(self, chunks: list[Chunk]) -> None:
        """Notes that the chunks' keys and values are in the KV cache."""
        for chunk in chunks:
            chunk.sequence.computed = chunk.end
            # For requests that arrive while this one runs. Of a resumed one, the logits behind the
            # prompt may be nobody's, so nothing has told yet whether its numbers are sound.
            if chunk.completes and not chunk.sequence.output and not chunk.sequence.request.sent:
                self._cache(chunk.sequence)

    def end(self, sequence: Sequence) -> None:
        """Removes a sequence; with its last sequence, a request releases its slots."""
        request = sequence.request
        self._cache(sequence)
        request.sequences.remove(sequence)
        if not request.sequences:
            self.release(request)

    def release(self, request: Request) -> None:
        """Removes a request, whether it runs or waits: finished, aborted or cancelled."""
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
        assert self.running_sequences <= self._max_num_seqs
        for request in self.running:
            assert len(request.slots) == request.slots_needed
            for sequence in request.sequences:
                assert len(sequence.slots) == sequence.length
                assert sequence.computed < sequence.length
                assert {*sequence.slots} <= {*request.slots}
        assert not any(request.slots for request in self.waiting)

    def _admit(self) -> tuple[Admission, ...]:
        admitted = []
        while self.waiting and (admission := self._try_to_admit(self.waiting[0])):
            admitted.append(admission)
        return tuple(admitted)

    def _try_to_admit(self, request: Request) -> Admission | None:
        """Admits the request at the head of the queue if there is room for it."""
        if self.running_sequences + request.width > self._max_num_seqs:
            return None
        # The last token is always computed, because its logits are needed.
        known = self.cached.match(request.digest, request.prompt[:-1])
        missing = request.slots_needed - len(known)
        own = self.kv.allocate(missing) if self.cached.make_room(missing) else None
        if own is None:
            self.kv.release(known)
            return None
        self.waiting.popleft()
        self.running.append(request)
        request.slots = known + own
        request.unused = request.slots[len(request.prompt) :]
        request.sequences = [
            Sequence(request, slots=request.slots[: len(request.prompt)], computed=len(known))
        ]
        self.cached_tokens += len(known)
        return Admission(request.id, len(request.prompt), len(known))

    def _cache(self, sequence: Sequence) -> None:
        if self._prefix_caching and sequence.computed:
            tokens = [*sequence.request.prompt, *sequence.output][: sequence.computed]
            self.cached.insert(sequence.request.digest, tokens, sequence.slots)
