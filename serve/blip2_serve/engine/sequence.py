"""One request inside the engine, and its lines of tokens. Plain Python: no torch, no text."""

from __future__ import annotations

from array import array
from dataclasses import dataclass, field
from typing import Any

from blip2_serve.types import SamplingParams, TokenLogprob


def _rows() -> array[int]:
    return array("q")


@dataclass(eq=False)
class Sequence:
    """A line of tokens: the answer itself, one of n samples, or one of the beams.

    `table` has the KV row of each token, the last one included, which is computed next.
    """

    request: Request
    index: int = 0
    output: list[int] = field(default_factory=list)
    table: array[int] = field(default_factory=_rows)
    computed: int = 0  # tokens whose keys and values are in the KV
    score: float = 0.0  # of a beam: the sum of its log-probabilities
    logprobs: list[TokenLogprob] = field(default_factory=list)  # of a beam, if asked for

    @property
    def length(self) -> int:
        return len(self.request.prompt) + len(self.output)

    def token_at(self, position: int) -> int:
        past_prompt = position - len(self.request.prompt)
        return self.request.prompt[position] if past_prompt < 0 else self.output[past_prompt]

    def fork(self, index: int) -> Sequence:
        """Another line that goes on from here; the KV so far is shared."""
        return Sequence(
            self.request,
            index,
            [*self.output],
            self.table[:],
            self.computed,
            self.score,
            [*self.logprobs],
        )

    def append(self, token: int) -> None:
        """Adds a token that is to be computed, and gives it a row."""
        self.output.append(token)
        self.table.append(self.request.spare.pop())


@dataclass(eq=False)
class Request:
    """A prompt, how to answer it, and the KV rows it holds.

    `prompt` starts with as many image token ids as `image` has rows; the runner puts the rows in
    their place. `image` is opaque here, `digest` stands for it. `params.max_tokens` is set.
    """

    id: str
    prompt: list[int]
    image: Any
    digest: str
    params: SamplingParams
    sequences: list[Sequence] = field(default_factory=list)  # one until the prompt is computed
    held: array[int] = field(default_factory=_rows)  # every row, shared ones included
    spare: array[int] = field(default_factory=_rows)  # those that no token has yet

    @property
    def width(self) -> int:
        """Sequences that are computed at once."""
        return max(self.params.num_beams, self.params.n)

    @property
    def reach(self) -> int:
        """KV rows it can ever need: the last token of a sequence is never fed back."""
        assert self.params.max_tokens is not None
        return len(self.prompt) + self.width * (self.params.max_tokens - 1)


@dataclass(frozen=True)
class Chunk:
    """Work of one step for one sequence: compute its tokens [start, end)."""

    sequence: Sequence
    start: int
    end: int

    @property
    def completes(self) -> bool:
        """Whether the last known token is in it, so that the next one can be chosen."""
        return self.end == self.sequence.length
