"""What travels between processes. No torch here: the ingress never imports it."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

FinishReason = Literal["stop", "length"]


@dataclass(frozen=True)
class ImagePrefix:
    """What the language model sees of one image: the Q-Former's projected query outputs.

    `data` is the row-major memory of a [queries, hidden] tensor of `dtype` ("bfloat16", ...).
    `digest` stands for the image bytes and the preprocessing: equal digests, equal prefixes.
    """

    digest: str
    data: bytes
    shape: tuple[int, int]
    dtype: str


@dataclass(frozen=True)
class SamplingParams:
    """How to generate; names are OpenAI's where it has one, transformers' otherwise.

    `temperature` 0 is greedy. `top_k` 0 and `top_p` 1 keep every token. `stop` strings are cut off
    the text. `max_tokens` None stands for the server's default, cut to the room that is left.
    """

    max_tokens: int | None = None
    min_tokens: int = 0
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    seed: int = 0
    stop: tuple[str, ...] = ()
    repetition_penalty: float = 1.0
    ignore_eos: bool = False


@dataclass(frozen=True)
class TokenEvent:
    """One or more new tokens of an answer, with the text that is certain by now.

    The text lags behind the tokens while it could still become half a character or a stop string.
    `token_ids` holds new tokens only, the final end-of-sequence token included.
    """

    token_ids: tuple[int, ...]
    text: str
    finish_reason: FinishReason | None = None
    prompt_tokens: int = 0

    def __add__(self, later: TokenEvent) -> TokenEvent:
        return replace(
            later, token_ids=self.token_ids + later.token_ids, text=self.text + later.text
        )


@dataclass(frozen=True)
class Completion:
    """A whole answer."""

    token_ids: tuple[int, ...]
    text: str
    finish_reason: FinishReason
    prompt_tokens: int
