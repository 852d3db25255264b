"""What travels between processes. No torch here: the ingress never imports it."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

FinishReason = Literal["stop", "length"]


@dataclass(frozen=True)
class ImageFeatures:
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
    `n` answers are the best of `num_beams` where that is above 1, and samples otherwise.
    `top_logprobs` None asks for no log-probabilities, k for those of a token and the k likeliest.
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
    n: int = 1
    num_beams: int = 1
    length_penalty: float = 1.0
    early_stopping: bool | Literal["never"] = False
    top_logprobs: int | None = None


@dataclass(frozen=True)
class TokenLogprob:
    """A token of an answer, or one that could have been, and its log-probability.

    That is the log-softmax of the model's raw logits, before penalties and temperature. `token` is
    the bytes it stands for; half a character is possible. `top` are the likeliest at its place.
    """

    token_id: int
    logprob: float
    token: bytes = b""
    top: tuple[TokenLogprob, ...] = ()


@dataclass(frozen=True)
class TokenEvent:
    """One or more new tokens of an answer, with the text that is certain by now.

    The text lags behind the tokens while it could still become half a character or a stop string.
    `token_ids` holds new tokens only, the final end-of-sequence token included; `index` says of
    which of the n answers. `last` is set on the last event of the whole request.
    """

    token_ids: tuple[int, ...]
    text: str
    finish_reason: FinishReason | None = None
    prompt_tokens: int = 0
    index: int = 0
    logprobs: tuple[TokenLogprob, ...] = ()
    last: bool = False

    def __add__(self, later: TokenEvent) -> TokenEvent:
        """Both as one; they must be of the same answer."""
        return replace(
            later,
            token_ids=self.token_ids + later.token_ids,
            text=self.text + later.text,
            logprobs=self.logprobs + later.logprobs,
        )


@dataclass(frozen=True)
class Choice:
    """One whole answer."""

    token_ids: tuple[int, ...]
    text: str
    finish_reason: FinishReason
    logprobs: tuple[TokenLogprob, ...] = ()


@dataclass(frozen=True)
class Completion:
    """The n answers to one request, the best first where they are ranked."""

    choices: tuple[Choice, ...]
    prompt_tokens: int

    @property
    def completion_tokens(self) -> int:
        return sum(len(choice.token_ids) for choice in self.choices)
