"""One request inside the engine. Plain Python: no torch, no text, no clock."""

from __future__ import annotations

from array import array
from dataclasses import dataclass, field
from typing import Any

from blip2_serve.types import FinishReason, SamplingParams


@dataclass(eq=False)
class Sequence:
    """Token ids and progress of one request.

    `prompt` starts with as many image token ids as `image` has rows; the runner puts the rows in
    their place. `image` is opaque here. `params.max_tokens` is set.
    """

    id: str
    prompt: list[int]
    image: Any
    params: SamplingParams
    output: list[int] = field(default_factory=list)
    computed: int = 0  # tokens whose keys and values are in the KV
    rows: array[int] = field(default_factory=lambda: array("q"))  # KV row of each position
    finish_reason: FinishReason | None = None

    @property
    def length(self) -> int:
        return len(self.prompt) + len(self.output)

    @property
    def reach(self) -> int:
        """KV rows this sequence can ever need: the last token it generates is never fed back."""
        assert self.params.max_tokens is not None
        return len(self.prompt) + self.params.max_tokens - 1

    def token_at(self, position: int) -> int:
        past_prompt = position - len(self.prompt)
        return self.prompt[position] if past_prompt < 0 else self.output[past_prompt]


@dataclass(frozen=True)
class Chunk:
    """Work of one step for one sequence: compute its tokens [start, end)."""

    sequence: Sequence
    start: int
    end: int

    @property
    def completes(self) -> bool:
        """Whether the last known token is in it, so that the next one can be sampled."""
        return self.end == self.sequence.length
