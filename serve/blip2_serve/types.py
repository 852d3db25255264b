"""Values that travel between processes. No torch: the ingress must not import it."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Literal

import numpy as np
from numpy.typing import NDArray

FinishReason = Literal["stop", "length"]


@dataclass(frozen=True)
class Pixels:
    """An image as one checkpoint's processor makes it.

    Attributes:
        values: uint8 [3, height, width].
        resample: Pillow's filter that it was resized with.
    """

    values: NDArray[np.uint8]
    resample: int

    def is_like(self, other: Pixels) -> bool:
        """Whether both were made for checkpoints that want the same of their processors."""
        return self.values.shape == other.values.shape and self.resample == other.resample


@dataclass(frozen=True)
class ImageFeatures:
    """What the language model sees of one image: the Q-Former's outputs, projected.

    Attributes:
        digest: Hash of the image file and the preprocessing version. Equal digests mean equal
            features.
        data: Row-major memory of a tensor of shape [queries, hidden].
        shape: That shape.
        dtype: Name of the tensor's dtype, such as "bfloat16".
        fingerprint: Of the checkpoint that they come from; empty if nobody knows.
        encode_s: Seconds that the encoder took for them, its queue included.
    """

    digest: str
    data: bytes
    shape: tuple[int, int]
    dtype: str
    fingerprint: str = ""
    encode_s: float = field(default=0.0, compare=False)


@dataclass(frozen=True)
class Call:
    """What travels with every call from the ingress to a stage.

    Attributes:
        id: Names the attempt; a call that is tried again gets another.
        seconds_left: Until the deadline of the request, when the call was sent. None: no deadline.
        refused: Requests that its ingress replica has refused since the call before it. More
            replicas of the stage could have taken them.
    """

    id: str
    seconds_left: float | None = None
    refused: int = 0


@dataclass(frozen=True)
class Vitals:
    """What a replica of a stage tells each ingress replica about itself, once per second.

    Attributes:
        replica: Ray Serve's unique id of the replica.
        callers: How many ingress replicas have asked it lately, this one included.
        capacity: Requests (or images) per second that it can do, if it knows yet.
        start_s: Seconds from the start of its process until it was ready.
        fingerprint: Of the checkpoint that it holds; empty for a stage without one.
    """

    replica: str
    callers: int = 1
    capacity: float | None = None
    start_s: float | None = None
    fingerprint: str = ""


@dataclass(frozen=True)
class StageStatus:
    """What one stage is doing now.

    Attributes:
        name: The stage's, or "ingress".
        running: Replicas that take requests.
        starting: Replicas that will, once they have loaded.
        stopping: Replicas that finish what they have.
        waiting: Requests, or images, that wait in its replicas; None if no replica answers.
        rate_per_s: Images, or tokens of answers, per second of late; None if no replica answers.
        capacity_per_s: Requests, or images, per second that it could do, as measured; None while
            nobody knows.
    """

    name: str
    running: int
    starting: int
    stopping: int
    waiting: int | None = None
    rate_per_s: float | None = None
    capacity_per_s: float | None = None


@dataclass(frozen=True)
class SamplingParams:
    """How to generate. Parameters have OpenAI's names, or else transformers'.

    Attributes:
        max_tokens: Maximum number of new tokens, cut to what the prompt leaves of the model's
            context and of the KV cache. None means the server's default.
        min_tokens: Number of new tokens before which nothing but `max_tokens` ends the answer.
        temperature: 0 is greedy decoding.
        top_p: Keeps the likeliest tokens that add up to this probability; 1 keeps every token.
        top_k: Keeps this many of the likeliest tokens; 0 keeps every token.
        min_p: Drops tokens less likely than this share of the likeliest one's probability.
        seed: Signed 64-bit integer.
        stop: Strings that end the answer. The text does not include them.
        repetition_penalty: Above 1, makes tokens of the prompt and the answer so far less likely.
        frequency_penalty: Subtracted from a token's logit for each time the answer has it.
        presence_penalty: Subtracted from the logits of tokens that the answer has.
        logit_bias: Token ids with what is added to their logits; each id once.
        ignore_eos: Whether to go on after an end-of-sequence token.
        n: Number of answers: the best of `num_beams` if that is above 1, samples otherwise, which
            are equal at temperature 0.
        num_beams: 1 means no beam search.
        length_penalty: Exponent of the length that divides a beam's score.
        early_stopping: When beam search ends, as in transformers.
        top_logprobs: Number of likeliest tokens to list with each token's log-probability. None
            means no log-probabilities at all.
        show_beams: Whether a stream tells of the beams at each step of a search.
    """

    max_tokens: int | None = None
    min_tokens: int = 0
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    seed: int = 0
    stop: tuple[str, ...] = ()
    repetition_penalty: float = 1.0
    frequency_penalty: float = 0.0
    presence_penalty: float = 0.0
    logit_bias: tuple[tuple[int, float], ...] = ()
    ignore_eos: bool = False
    n: int = 1
    num_beams: int = 1
    length_penalty: float = 1.0
    early_stopping: bool | Literal["never"] = False
    top_logprobs: int | None = None
    show_beams: bool = False

    @property
    def is_greedy(self) -> bool:
        """Whether the answer is the likeliest token, one after the other: all n are equal."""
        return self.temperature == 0 and self.num_beams == 1


@dataclass(frozen=True)
class TokenLogprob:
    """The log-probability of a token, whether it was generated or only likely.

    Attributes:
        token_id: The token's id.
        logprob: Log-softmax of the model's logits, before penalties and temperature.
        token: The bytes it decodes to; they may end within a character.
        top: The likeliest tokens at its position, for generated tokens only.
    """

    token_id: int
    logprob: float
    token: bytes = b""
    top: tuple[TokenLogprob, ...] = ()


@dataclass(frozen=True)
class Beam:
    """One line of a beam search under way.

    Attributes:
        text: Of its tokens so far.
        score: Its log-probability divided by length ** length_penalty.
        ended: Whether it is a whole answer, which others may still overtake.
    """

    text: str
    score: float
    ended: bool


@dataclass(frozen=True)
class TokenEvent:
    """New tokens of one answer, with the text that they have made certain.

    The text lags behind the tokens while its end may be half a character or part of a stop string.

    Attributes:
        token_ids: The new tokens, a final end-of-sequence token included.
        text: The new text; may be empty.
        finish_reason: Set on the last event of the answer.
        prompt_tokens: Length of the prompt in tokens, image positions included.
        index: Which of the n answers, from 0.
        logprobs: One for each new token, if asked for.
        last: Set on the last event of the whole request.
        queue_s: On the first event of a stream, seconds that the request waited for the engine.
        beams: The search's beams after this step, best first, if asked for.
        resumed: Set on the first event after a replica was lost in the middle of the answer.
    """

    token_ids: tuple[int, ...]
    text: str
    finish_reason: FinishReason | None = None
    prompt_tokens: int = 0
    index: int = 0
    logprobs: tuple[TokenLogprob, ...] = ()
    last: bool = False
    queue_s: float = field(default=0.0, compare=False)
    beams: tuple[Beam, ...] = ()
    resumed: bool = False

    def __add__(self, later: TokenEvent) -> TokenEvent:
        """Joins two successive events of the same answer."""
        return replace(
            later,
            token_ids=self.token_ids + later.token_ids,
            text=self.text + later.text,
            logprobs=self.logprobs + later.logprobs,
            beams=later.beams or self.beams,
        )


@dataclass(frozen=True)
class Choice:
    """One whole answer; fields as in `TokenEvent`."""

    token_ids: tuple[int, ...]
    text: str
    finish_reason: FinishReason
    logprobs: tuple[TokenLogprob, ...] = ()


@dataclass(frozen=True)
class Completion:
    """The n answers to one request; with beam search, the best comes first."""

    choices: tuple[Choice, ...]
    prompt_tokens: int

    @property
    def completion_tokens(self) -> int:
        return sum(len(choice.token_ids) for choice in self.choices)
