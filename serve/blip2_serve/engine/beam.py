"""Beam search over candidates scored elsewhere. Pure Python: no torch, no text.

Arithmetic and order follow transformers (`GenerationMixin._beam_search`). Candidates that end an
answer become hypotheses if they rank among the first `num_beams`; the best of the others live on.
A hypothesis scores its log-probability divided by length ** length_penalty.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import takewhile

from blip2_serve.engine.sequence import Request, Sequence
from blip2_serve.types import FinishReason, TokenLogprob

Line = tuple[list[int], float, bool]  # tokens, score, whether it is a hypothesis


@dataclass(frozen=True)
class Candidate:
    """A beam and one more token; `score` sums the log-probabilities of both."""

    beam: Sequence
    token: int
    score: float
    logprob: TokenLogprob | None = None  # if requested


@dataclass(frozen=True)
class Hypothesis:
    """A finished answer: a beam and the token that ended it."""

    score: float
    beam: Sequence
    tokens: list[int]
    logprobs: list[TokenLogprob]
    reason: FinishReason


class BeamSearch:
    """The search of one request; `eos` is empty if end tokens are ignored."""

    def __init__(self, request: Request, eos: frozenset[int]) -> None:
        self._request = request
        self._eos = eos
        self._agreed = 0
        self.hypotheses: list[Hypothesis] = []  # best first, at most num_beams

    @property
    def candidates(self) -> int:
        """How many candidates `step` needs so that num_beams live on even if the others end."""
        return int(max(2, 1 + len(self._eos)) * self._request.params.num_beams)

    def step(self, candidates: list[Candidate]) -> list[Sequence]:
        """Returns the beams that live on, best first, or none when the search is over.

        `candidates` must come best first. The returned beams take over the request's KV slots.
        """
        params = self._request.params
        length = len(candidates[0].beam.output) + 1
        at_limit = length == params.max_tokens
        ends = [at_limit or c.token in self._eos for c in candidates]
        for candidate, end in list(zip(candidates, ends, strict=True))[: params.num_beams]:
            if end:
                self._add(candidate, length)
        live = [c for c, end in zip(candidates, ends, strict=True) if not end][: params.num_beams]
        if not live or self._is_over(live[0].score, length):
            return []
        beams = _continued(live)
        for beam, candidate in zip(beams, live, strict=True):
            beam.append(candidate.token)
            beam.score = candidate.score
            if candidate.logprob:
                beam.logprobs.append(candidate.logprob)
        return beams

    def newly_agreed(self, beams: list[Sequence]) -> tuple[list[int], list[TokenLogprob]]:
        """Tokens that every possible answer now shares, except those returned before.

        With n = 1 the possible answers are the living beams and the best hypothesis; a worse
        hypothesis can never win.
        """
        lines = [(beam.output, beam.logprobs) for beam in beams]
        if self.hypotheses:
            lines.append((self.hypotheses[0].tokens, self.hypotheses[0].logprobs))
        start = self._agreed
        columns = zip(*(tokens[start:] for tokens, _ in lines), strict=False)
        self._agreed += sum(1 for _ in takewhile(lambda column: len({*column}) == 1, columns))
        tokens, logprobs = lines[0]
        return tokens[start : self._agreed], logprobs[start : self._agreed]

    def lines(self, beams: list[Sequence]) -> list[Line]:
        """The hypotheses and the living beams, best first; without end tokens."""
        penalty = self._request.params.length_penalty
        ended: list[Line] = [
            (h.tokens[:-1] if h.reason == "stop" else h.tokens, h.score, True)
            for h in self.hypotheses
        ]
        alive = [([*b.output], b.score / len(b.output) ** penalty, False) for b in beams]
        return sorted(ended + alive, key=lambda line: -line[1])

    def _add(self, candidate: Candidate, length: int) -> None:
        params = self._request.params
        beam, logprob = candidate.beam, candidate.logprob
        hypothesis = Hypothesis(
            candidate.score / length**params.length_penalty,
            beam.fork(beam.index),  # the beam itself may go on
            [*beam.output, candidate.token],
            [*beam.logprobs, logprob] if logprob else [],
            "stop" if candidate.token in self._eos else "length",
        )
        self.hypotheses.append(hypothesis)
        self.hypotheses.sort(key=lambda h: -h.score)
        del self.hypotheses[params.num_beams :]

    def _is_over(self, best_score: float, length: int) -> bool:
        """Whether no living beam can still rank among the best, by transformers' estimate."""
        params = self._request.params
        if len(self.hypotheses) < params.num_beams:
            return False
        if params.early_stopping is True:
            return True
        assert params.max_tokens is not None
        farthest = params.early_stopping == "never" and params.length_penalty > 0
        best_length = params.max_tokens if farthest else length
        best_possible: float = best_score / best_length**params.length_penalty
        return best_possible <= self.hypotheses[-1].score


def _continued(live: list[Candidate]) -> list[Sequence]:
    """The first candidate of a beam continues it in place; further ones fork it."""
    gone_on: set[Sequence] = set()
    beams = []
    for index, candidate in enumerate(live):
        beam = candidate.beam.fork(index) if candidate.beam in gone_on else candidate.beam
        beam.index = index
        gone_on.add(candidate.beam)
        beams.append(beam)
    return beams
