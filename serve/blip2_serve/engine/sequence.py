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

    `slots` has the KV slot of each token, the last one included, which is computed next.
    """

    request: Request
    index: int = 0
    output: list[int] = field(default_factory=list)
    slots: array[int] = field(default_factory=_rows)
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
            self.slots[:],
            self.computed,
            self.score,
            [*self.logprobs],
        )

    def append(self, token: int) -> None:
        """Adds a token that is to be computed, and gives it a slot."""
        self.output.append(token)
        self.slots.append(self.request.unused.pop())


@dataclass(eq=False)
class Request:
    """A prompt, how to answer it, and the KV slots it holds.

    `prompt` starts with as many image token ids as `image` has slots; the runner puts the slots in
    their place. `image` is opaque here, `digest` stands for it. `params.max_tokens` is set.
    """

    id: str
    prompt: list[int]
    image: Any
    digest: str
    params: SamplingParams
    sequences: list[Sequence] = field(default_factory=list)  # one until the prompt is computed
    slots: array[int] = field(default_factory=_rows)  # every slot, shared ones included
    unused: array[int] = field(default_factory=_rows)  # those that no token has yet

    @property
    def width(self) -> int:
        """Sequences that are computed at once."""
        return max(self.params.num_beams, self.params.n)

    @property
    def slots_needed(self) -> int:
        """KV slots it can ever need: the last token of a sequence is never fed back."""
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
