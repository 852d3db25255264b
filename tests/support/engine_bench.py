"""An engine without a model: the answers are scripted."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from typing import Any

from blip2_serve.compute.sampler import Choice
from blip2_serve.engine.beam import Candidate
from blip2_serve.engine.engine import Engine
from blip2_serve.engine.scheduler import Scheduler
from blip2_serve.engine.sequence import Chunk, Request, Sequence
from blip2_serve.engine.slots import KvSlots
from blip2_serve.engine.step import NO_NUMBERS
from blip2_serve.errors import Blip2ServeError
from blip2_serve.types import TokenEvent, TokenLogprob
from support.byte_tokens import EOS, OTHER_EOS, decode, tokens
from support.requests import make_request

Script = str | list[int]


class FakeRunner:
    """Counts the tokens it was given, and asserts that each finds all earlier ones in their slots.

    `memory` models the KV cache: each slot has its token, all tokens before it, and the image.
    """

    def __init__(self) -> None:
        self.computed = 0
        self.memory: dict[int, int] = {}

    def run(self, chunks: list[Chunk]) -> str:
        assert chunks
        for chunk in chunks:
            sequence = chunk.sequence
            self.computed += chunk.end - chunk.start
            prefix = hash(sequence.request.digest)
            for position, token in enumerate(sequence.tokens(0, chunk.end)):
                prefix = hash((prefix, token))
                slot = sequence.slots[position]
                if position >= chunk.start:
                    self.memory[slot] = prefix
                assert self.memory[slot] == prefix, "KV of other tokens"
        return "logits"


class ScriptedSampler:
    """Chooses the tokens of a script.

    A request has one script per sample. For a beam search, the scripts are all possible answers,
    best first, and a beam's score is that of the best answer that starts with it. The token
    NO_NUMBERS stands for logits that are not finite.
    """

    def __init__(self, scripts: dict[str, list[list[int]]]) -> None:
        self.scripts = scripts

    def choose(
        self, logits: Any, rows: list[int], sequences: list[Sequence]
    ) -> Callable[[], list[Choice]]:
        assert logits == "logits"
        assert len(rows) == len(sequences)
        choices = []
        for sequence in sequences:
            token = self.scripts[sequence.request.id][sequence.index][len(sequence.output)]
            choices.append(Choice(token, self._logprob(sequence, token)))
        return lambda: choices

    def expand(
        self, logits: Any, rows: list[int], beams: list[Sequence], count: int
    ) -> Callable[[], list[Candidate]]:
        assert logits == "logits"
        assert len(rows) == len(beams)
        found: dict[tuple[int, int], float] = {}
        for rank, script in enumerate(self.scripts[beams[0].request.id]):
            for i, beam in enumerate(beams):
                length = len(beam.output)
                if script[:length] == beam.output and length < len(script):
                    found.setdefault((i, script[length]), -1.0 - rank)
        if any(token == NO_NUMBERS for _, token in found):
            return list
        for junk in range(count):
            found.setdefault((0, junk), -100.0 - junk)
        best = sorted(found.items(), key=lambda item: -item[1])[:count]
        candidates = [
            Candidate(beams[i], token, score, self._logprob(beams[i], token))
            for (i, token), score in best
        ]
        return lambda: candidates

    def _logprob(self, sequence: Sequence, token: int) -> TokenLogprob | None:
        requested = sequence.request.params.top_logprobs is not None
        return TokenLogprob(token, -float(len(sequence.output))) if requested else None


class Bench:
    """An engine with a `FakeRunner` and a `ScriptedSampler`, which collects its events."""

    asynchronous = False  # the fixture `devices` runs tests both ways

    def __init__(
        self,
        slots: int = 200,
        max_num_seqs: int = 4,
        max_waiting: int = 1000,
        step: int = 16,
        prefix_caching: bool = False,
    ) -> None:
        self.now = 0.0  # the engine's clock
        self.scripts: dict[str, list[list[int]]] = {}
        self.runner = FakeRunner()
        scheduler = Scheduler(
            KvSlots(slots),
            max_num_seqs=max_num_seqs,
            max_waiting=max_waiting,
            max_num_batched_tokens=step,
            prefix_caching=prefix_caching,
        )
        self.engine = Engine(
            self.runner,
            scheduler,
            ScriptedSampler(self.scripts),
            decode=decode,
            eos_token_ids=(EOS, OTHER_EOS),
            asynchronous=self.asynchronous,
            clock=lambda: self.now,
        )
        self.events: defaultdict[str, list[TokenEvent]] = defaultdict(list)
        self.failures: dict[str, Blip2ServeError] = {}

    def add(
        self,
        name: str,
        *scripts: Script,
        prompt: int | list[int] = 3,
        sent: tuple[tuple[int, ...] | None, ...] = (),
        expires: float | None = None,
        **params: Any,
    ) -> Request:
        self.scripts[name] = [s if isinstance(s, list) else tokens(s) for s in scripts]
        longest = max(map(len, self.scripts[name]))
        request = make_request(name, prompt, **{"max_tokens": longest, **params})
        request.sent, request.expires = sent, expires
        self.engine.add(request)
        return request

    def step(self) -> None:
        """Takes the tokens of one step."""
        results = [self.engine.step()]
        if results[0].report is None and self.engine.has_work:  # only launched the first
            results.append(self.engine.step())
        for result in results:
            for name, event in result.events:
                self.events[name].append(event)
            self.failures |= result.failures
        self.engine.check_integrity()

    def finish(self) -> None:
        while self.engine.has_work:
            self.step()
        self.engine.check_idle()

    def answer(self, name: str, index: int = 0) -> tuple[list[int], str, str | None]:
        """Returns token ids, text and finish reason of one of a request's answers."""
        events = [e for e in self.events[name] if e.index == index]
        assert all(e.finish_reason is None for e in events[:-1])
        ids = [token for e in events for token in e.token_ids]
        return ids, "".join(e.text for e in events), events[-1].finish_reason

    def texts(self, name: str) -> list[str]:
        """Returns the texts of all answers of a finished request."""
        assert [e.last for e in self.events[name]] == [False] * (len(self.events[name]) - 1) + [
            True
        ]
        indices = {e.index for e in self.events[name]}
        assert indices == {*range(len(indices))}
        return [self.answer(name, index)[1] for index in sorted(indices)]
