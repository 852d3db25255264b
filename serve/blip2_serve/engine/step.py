"""What a step of the engine needs, and what it reports."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, Protocol

from blip2_serve.engine.beam import Candidate
from blip2_serve.engine.scheduler import Admission, Plan
from blip2_serve.engine.sequence import Chunk, Sequence
from blip2_serve.errors import Blip2ServeError, TimedOut
from blip2_serve.types import TokenEvent, TokenLogprob

Event = tuple[str, TokenEvent]  # request id, and what is new
Failure = tuple[str, Blip2ServeError]  # request id, and why it ended without an answer


class Runner(Protocol):
    def run(self, chunks: list[Chunk]) -> Any: ...


NO_NUMBERS = -1  # the token of a sequence whose logits are not all finite


class Choice(Protocol):
    @property
    def token(self) -> int:
        """The next token, or NO_NUMBERS."""

    @property
    def logprob(self) -> TokenLogprob | None: ...


class Sampler(Protocol):
    """Both queue their work behind the runner's and return what waits for the results.

    There are no candidates if the logits of any beam are not all finite.
    """

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

    prefills: int  # sequences with a chunk of their prompt, or of what they resume, in the step
    decodes: int  # sequences that advanced by one token
    tokens: int  # of prompts and answers together

    @classmethod
    def of(cls, plan: Plan) -> StepReport:
        chunks, decodes = plan.chunks, plan.decodes
        tokens = sum(chunk.end - chunk.start for chunk in chunks)
        return cls(len(chunks) - decodes, decodes, tokens)

    @property
    def phase(self) -> str:
        return "decode" if not self.prefills else "mixed" if self.decodes else "prefill"


@dataclass(frozen=True)
class StepResult:
    events: list[Event]
    report: StepReport | None  # of the step that produced them; None if none had been launched
    admitted: tuple[Admission, ...]  # to the step that was launched
    failures: list[Failure]

    @property
    def expired(self) -> int:
        """Requests whose time was over."""
        return sum(isinstance(error, TimedOut) for _, error in self.failures)
