"""Which tokens the next step computes. Pure Python on ints: no torch, no text, no clock.

First come, first served. A request is admitted once all the KV rows that it can ever reach are
free, less those of a beginning that is known already, so a running request never waits for memory
and is never preempted. Each step decodes one token of every sequence that is past its prompt, and
spends what is left of `max_step_tokens` on prompts, in chunks: however long a prompt is, the others
wait for one bounded step only.
"""

from __future__ import annotations

from array import array
from collections import deque
from dataclasses import dataclass

from blip2_serve.engine.kv import KvRows
from blip2_serve.engine.prefix_tree import PrefixTree
from blip2_serve.engine.sequence import Chunk, Request, Sequence
from blip2_serve.errors import ContextLengthExceeded, InvalidRequest, Overloaded


@dataclass(frozen=True)
class Admission:
    """A request that waited and now runs."""

    request_id: str
    prompt_tokens: int
    reused_tokens: int  # of them, whose keys and values were there


class Scheduler:
    """`reuse`: keep the KV of what was computed, for requests that begin the same."""

    def __init__(
        self,
        kv: KvRows,
        *,
        max_running: int,
        max_waiting: int,
        max_step_tokens: int,
        reuse: bool = True,
    ) -> None:
        assert (
            max_step_tokens > max_running
        )  # or prompts would starve; the configuration sees to it
        self.kv = kv
        self.kept = PrefixTree(kv)
        self.waiting: deque[Request] = deque()
        self.running: list[Request] = []  # in order of admission
        self.admitted: list[Admission] = []  # by the last `schedule`
        self.reused_tokens = 0  # of prompts, since the start
        self._max_running = max_running  # sequences
        self._max_waiting = max_waiting  # requests
        self._max_step_tokens = max_step_tokens
        self._reuse = reuse

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
        if request.reach > self.kv.total:
            raise ContextLengthExceeded(
                f"prompt and max_tokens reach {request.reach} tokens; this server's KV has room "
                f"for {self.kv.total}",
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
                self._keep(chunk.sequence)  # for requests that come while this one runs

    def end(self, sequence: Sequence) -> None:
        """Takes a sequence out; with its last sequence, a request gives back its rows."""
        request = sequence.request
        self._keep(sequence)
        request.sequences.remove(sequence)
        if not request.sequences:
            self.release(request)

    def release(self, request: Request) -> None:
        """Takes a request out, running or waiting."""
        if request in self.waiting:
            self.waiting.remove(request)
        else:
            self.running.remove(request)
            self.kv.give_back(request.held)
        request.sequences, request.held, request.spare = [], array("q"), array("q")

    def check_integrity(self) -> None:
        """Asserts what must hold between steps."""
        self.kept.check_integrity()
        self.kv.check_integrity((r.held for r in self.running), self.kept.holdings())
        assert self.running_sequences <= self._max_running
        for request in self.running:
            assert len(request.held) == request.reach
            for sequence in request.sequences:
                assert len(sequence.table) == sequence.length
                assert sequence.computed < sequence.length
                assert {*sequence.table} <= {*request.held}
        assert not any(request.held for request in self.waiting)

    def _admit(self) -> None:
        while self.waiting:
            request = self.waiting[0]
            if self.running_sequences + request.width > self._max_running:
                return
            # Not the last token: its logits are needed, so it must be computed.
            known = self.kept.match(request.digest, request.prompt[:-1])
            missing = request.reach - len(known)
            own = self.kv.take(missing) if self.kept.make_room(missing) else None
            if own is None:
                self.kv.give_back(known)
                return
            self.waiting.popleft()
            self.running.append(request)
            request.held = known + own
            request.spare = request.held[len(request.prompt) :]
            request.sequences = [
                Sequence(request, table=request.held[: len(request.prompt)], computed=len(known))
            ]
            self.admitted.append(Admission(request.id, len(request.prompt), len(known)))
            self.reused_tokens += len(known)

    def _keep(self, sequence: Sequence) -> None:
        if self._reuse and sequence.computed:
            tokens = [*sequence.request.prompt, *sequence.output][: sequence.computed]
            self.kept.insert(sequence.request.digest, tokens, sequence.table)
