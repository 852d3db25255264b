"""One request inside the engine and its sequences of tokens. Plain Python: no torch, no text."""

from __future__ import annotations

from array import array
from dataclasses import dataclass, field
from typing import Any

from blip2_serve.types import SamplingParams, TokenLogprob


def _no_slots() -> array[int]:
    return array("q")


@dataclass(eq=False)
class Sequence:
    """A sequence of tokens: the answer itself, one of n samples, or one of the beams.

    `slots` has the KV slot of each token (a block table with blocks of one token), including the
    last token, whose keys and values the next step computes.
    """

    request: Request
    index: int = 0
    output: list[int] = field(default_factory=list)
    slots: array[int] = field(default_factory=_no_slots)
    computed: int = 0  # tokens whose keys and values are in the KV cache
    score: float = 0.0  # of a beam: the sum of its log-probabilities
    logprobs: list[TokenLogprob] = field(default_factory=list)  # of a beam, if requested

    @property
    def length(self) -> int:
        return len(self.request.prompt) + len(self.output)

    @property
    def decodes(self) -> bool:
        """Whether only the last token of its answer is left to compute."""
        return bool(self.output) and self.computed + 1 == self.length

    def token_at(self, position: int) -> int:
        past_prompt = position - len(self.request.prompt)
        return self.request.prompt[position] if past_prompt < 0 else self.output[past_prompt]

    def tokens(self, start: int, end: int) -> list[int]:
        """Its tokens [start, end), of prompt and answer."""
        prompt = self.request.prompt
        if end <= len(prompt):
            return prompt[start:end]
        answered = end - len(prompt)
        return prompt[start:] + self.output[max(0, start - len(prompt)) : answered]

    def fork(self, index: int) -> Sequence:
        """Another sequence that continues from here and shares the KV so far."""
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
        """Adds a token for the next step to compute, in one of the request's unused slots."""
        self.output.append(token)
        self.slots.append(self.request.unused.pop())


@dataclass(eq=False)
class Request:
    """A prompt, how to answer it, and the KV slots it holds.

    `prompt` starts with one image token id for each row of `image`, the image features; the runner
    replaces their embeddings with these rows. `image` is opaque here; `digest` identifies it.
    `params.max_tokens` must be set.

    `sent` is empty, or has for each of the n answers the tokens that the client has received
    already, None for an answer that it has received to its end. The others go on after these tokens
    as if they had never been interrupted.

    `expires` is when its time is over, by the engine's clock; None: never.
    """

    id: str
    prompt: list[int]
    image: Any
    digest: str
    params: SamplingParams
    sent: tuple[tuple[int, ...] | None, ...] = ()
    expires: float | None = None
    sequences: list[Sequence] = field(default_factory=list)  # one until prefill is done
    slots: array[int] = field(default_factory=_no_slots)  # all of them, shared ones included
    unused: array[int] = field(default_factory=_no_slots)  # those without a token yet

    @property
    def width(self) -> int:
        """Sequences that run at once."""
        return max(self.params.num_beams, self.params.n)

    @property
    def slots_needed(self) -> int:
        """KV slots it can ever need. The last token of a sequence is never fed back."""
        assert self.params.max_tokens is not None
        return len(self.prompt) + self.width * (self.params.max_tokens - 1)

    def samples(self) -> list[Sequence]:
        """Forks the prompt's sequence, about to be computed, into the unfinished answers.

        Those that continue earlier ones have tokens that are yet to be computed.
        """
        (prompt,) = self.sequences
        sent = self.sent or ((),) * self.params.n
        samples = []
        for index, tokens in enumerate(sent):
            if tokens is None:
                continue
            sample = prompt.fork(index)
            sample.computed = len(self.prompt)
            for token in tokens:
                sample.append(token)
            samples.append(sample)
        return samples


@dataclass(frozen=True)
class Chunk:
    """One sequence's share of a step: compute its tokens [start, end)."""

    sequence: Sequence
    start: int
    end: int

    @property
    def completes(self) -> bool:
        """Whether it includes the last known token, so that the next one can be sampled."""
        return self.end == self.sequence.length

    @property
    def decodes(self) -> bool:
        """Whether it is the last token of an answer, from which the next one follows."""
        return self.end - self.start == 1 and bool(self.sequence.output) and self.completes
