"""The bodies of requests. Everything wrong with a request's form is found here.

Unknown fields are errors that name the field. Fields that OpenAI's clients send but that have no
effect here are accepted; those that would have one only with their neutral value. This module knows
neither the model nor what is in an image.

Descriptions appear on /docs and in the documentation, so each stands alone.
"""

from __future__ import annotations

import secrets
from dataclasses import replace
from typing import Annotated, Any, Literal

from pydantic import Field, StringConstraints, field_validator, model_validator

from blip2_serve.errors import InvalidRequest
from blip2_serve.http.chat import Message, check_parts
from blip2_serve.http.presets import PRESETS, Preset
from blip2_serve.http.validation import Strict
from blip2_serve.types import SamplingParams

MAX_STOP_STRINGS = 16
MAX_STOP_LENGTH = 256
MAX_IMAGES = 64
MAX_CHOICES = 16
MAX_BEAMS = 8
MAX_TOP_LOGPROBS = 20

_INT64 = 1 << 63

# Fields that go into SamplingParams as they are.
_PASSED_ON = {
    "min_tokens",
    "temperature",
    "top_p",
    "min_p",
    "repetition_penalty",
    "ignore_eos",
    "n",
    "num_beams",
    "length_penalty",
    "early_stopping",
}

StopString = Annotated[str, StringConstraints(min_length=1, max_length=MAX_STOP_LENGTH)]


# -- parameters ----------------------------------------------------------------------------------


class GenerationFields(Strict):
    """How to generate: the fields of all routes, in JSON and multipart bodies alike."""

    model: str | None = Field(
        None,
        description="Name of the served model, as listed by `/v1/models`: `NAME`, or "
        "`NAME:caption` or `NAME:vqa` for a preset. May be left out; any other name is an error.",
    )
    max_tokens: int | None = Field(
        None,
        ge=1,
        description="Maximum number of tokens to generate. Defaults to the server's limit, or to "
        "what the prompt leaves of the model's context if that is less.",
    )
    min_tokens: int | None = Field(
        None,
        ge=0,
        description="Minimum number of tokens to generate: before that, neither the "
        "end-of-sequence token nor a `stop` string ends the answer. Must not exceed `max_tokens`.",
    )
    temperature: float | None = Field(
        None,
        ge=0,
        le=2,
        description="Sampling temperature, 0 to 2. Higher values make answers more random; 0 "
        "always takes the likeliest token.",
    )
    top_p: float | None = Field(
        None,
        gt=0,
        le=1,
        description="Samples only from the likeliest tokens whose probabilities add up to "
        "`top_p`. 1 keeps every token. Needs `temperature` above 0.",
    )
    top_k: int | None = Field(
        None,
        ge=-1,
        description="Samples only from the `top_k` likeliest tokens. 0 and -1 keep every token. "
        "Needs `temperature` above 0.",
    )
    min_p: float | None = Field(
        None,
        ge=0,
        le=1,
        description="Samples only from tokens at least `min_p` times as likely as the likeliest "
        "one. 0 keeps every token. Needs `temperature` above 0.",
    )
    seed: int | None = Field(
        None,
        ge=-_INT64,
        lt=_INT64,
        description="Seed for sampling, a signed 64-bit integer. The same request with the same "
        "seed gets the same answer, whatever else the server is doing.",
    )
    stop: StopString | list[StopString] | None = Field(
        None,
        description=f"Ends the answer before the first of these strings. Up to {MAX_STOP_STRINGS} "
        f"strings of 1 to {MAX_STOP_LENGTH} characters.",
    )
    repetition_penalty: float | None = Field(
        None,
        ge=0.01,
        le=10,
        description="Makes tokens that occur in the prompt or the answer so far less likely if "
        "above 1, more likely if below 1. Same as in transformers; 0.01 to 10.",
    )
    ignore_eos: bool | None = Field(
        None,
        description="Whether to generate past the end-of-sequence token, up to `max_tokens`.",
    )
    return_token_ids: bool | None = Field(
        None,
        description="Whether to return the ids of the generated tokens as `token_ids`, next to "
        "the text.",
    )
    n: int | None = Field(
        None,
        ge=1,
        le=MAX_CHOICES,
        description=f"Number of answers, 1 to {MAX_CHOICES}: samples if `temperature` is above 0, "
        "otherwise the best of `num_beams`, which must be at least `n`.",
    )
    num_beams: int | None = Field(
        None,
        ge=1,
        le=MAX_BEAMS,
        description=f"Number of beams for beam search, 1 to {MAX_BEAMS}. 1 means no beam search. "
        "More than 1 needs `temperature` 0.",
    )
    length_penalty: float | None = Field(
        None,
        ge=-10,
        le=10,
        description="Exponent of the length by which beam search divides the score of an answer, "
        "-10 to 10. Higher values lead to longer answers. Needs `num_beams` above 1.",
    )
    early_stopping: bool | Literal["never"] | None = Field(
        None,
        description="When beam search ends, as in transformers: with `true` once there are "
        "`num_beams` finished answers, with `false` once better ones are unlikely, with "
        '`"never"` once better ones are impossible. Needs `num_beams` above 1.',
    )
    preset: Preset | None = Field(
        None,
        description="Settings of LAVIS, BLIP-2's reference code. `caption`: 5 beams, 8 to 30 "
        "tokens and, without a prompt or a question, the prompt `a photo of`. `vqa`: 5 beams, 1 to "
        "10 tokens, length penalty 0 and, in a chat, a prompt that asks for a short answer. Other "
        "fields of the request override the preset's.",
    )

    @field_validator("stop")
    @classmethod
    def _few_stops(cls, value: str | list[str] | None) -> str | list[str] | None:
        if isinstance(value, list) and len(value) > MAX_STOP_STRINGS:
            raise ValueError(f"at most {MAX_STOP_STRINGS} stop strings are allowed")
        return value

    @property
    def token_limit(self) -> int | None:
        return self.max_tokens

    @property
    def limit_name(self) -> str:
        """The field that `token_limit` comes from."""
        return "max_tokens"

    @property
    def logprobs_wanted(self) -> int | None:
        """How many of the likeliest tokens to list at each place; None: no log-probabilities."""
        return None

    def sampling_params(self) -> SamplingParams:
        """The preset's parameters, or the defaults, with the request's own fields on top.

        Draws a seed if the request has none.

        Raises:
            InvalidRequest: the parameters contradict each other.
        """
        preset = PRESETS[self.preset] if self.preset else SamplingParams()
        params = replace(
            preset,
            max_tokens=self.token_limit or preset.max_tokens,
            top_k=max(self.top_k or 0, 0),
            seed=secrets.randbelow(_INT64) if self.seed is None else self.seed,
            stop=(self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ()),
            top_logprobs=self.logprobs_wanted,
            **self.model_dump(include=_PASSED_ON, exclude_none=True),
        )
        if self.min_tokens is None and params.max_tokens is not None:
            # A limit below the preset's minimum lowers the minimum.
            params = replace(params, min_tokens=min(params.min_tokens, params.max_tokens))
        self._check(params)
        return params

    def _check(self, params: SamplingParams) -> None:
        sampled, beams = params.temperature > 0, params.num_beams > 1
        narrowing = {
            "top_k": params.top_k > 1,
            "top_p": params.top_p < 1,
            "min_p": params.min_p > 0,
        }
        if not sampled and any(narrowing.values()):
            name = next(name for name, given in narrowing.items() if given)
            raise InvalidRequest(f"{name} needs temperature > 0; without it nothing is drawn", name)
        if sampled and beams:
            raise InvalidRequest(
                "temperature must be 0 with num_beams > 1; beam search does not sample",
                "temperature",
            )
        if beams and params.n > params.num_beams:
            raise InvalidRequest(f"n must not exceed num_beams ({params.num_beams})", "n")
        if not beams and not sampled and params.n > 1:
            raise InvalidRequest("n > 1 needs temperature > 0, or num_beams of at least n", "n")
        if not beams and (self.early_stopping or self.length_penalty not in (None, 1)):
            name = "early_stopping" if self.early_stopping else "length_penalty"
            raise InvalidRequest(f"{name} needs num_beams > 1", name)
        if params.max_tokens is not None and params.min_tokens > params.max_tokens:
            raise InvalidRequest(
                f"min_tokens must not exceed {self.limit_name} ({params.max_tokens})", "min_tokens"
            )


class StreamOptions(Strict):
    include_usage: bool | None = Field(
        None,
        description="Whether to send the token counts of the whole request in a last chunk, "
        "which has no choices.",
    )
    include_obfuscation: Literal[False] | None = Field(
        None, description="Whether to pad chunks to hide their length; only `false` is supported."
    )


class StreamFields(Strict):
    stream: bool | None = Field(
        None, description="Whether to send the answer as server-sent events while it is generated."
    )
    stream_options: StreamOptions | None = Field(
        None, description="Options of a streamed answer. Needs `stream`."
    )

    @model_validator(mode="after")
    def _options_need_stream(self) -> StreamFields:
        if self.stream_options is not None and not self.stream:
            raise InvalidRequest("stream_options needs stream: true", "stream_options")
        return self

    @property
    def include_usage(self) -> bool:
        return self.stream_options is not None and bool(self.stream_options.include_usage)


# -- chat ----------------------------------------------------------------------------------------

_IGNORED = "Has no effect; accepted because OpenAI's clients send it."


class TextFormat(Strict):
    type: Literal["text"]


class ChatRequest(GenerationFields, StreamFields):
    messages: list[Message] = Field(
        min_length=1,
        description="The chat so far, ending with a user message. One image is needed, in any "
        "user message; later turns may repeat it. A chat without a question asks for a caption.",
    )
    max_completion_tokens: int | None = Field(
        None, ge=1, description="OpenAI's newer name for `max_tokens`. Send only one of the two."
    )
    logprobs: bool | None = Field(
        None,
        description="Whether to return the log-probability of each generated token, before "
        "penalties and temperature.",
    )
    top_logprobs: int | None = Field(
        None,
        ge=0,
        le=MAX_TOP_LOGPROBS,
        description="Number of likeliest tokens to return at each position with their "
        f"log-probabilities, 0 to {MAX_TOP_LOGPROBS}. Needs `logprobs`.",
    )
    user: str | None = Field(None, description=_IGNORED)
    metadata: dict[str, str] | None = Field(None, description=_IGNORED)
    store: bool | None = Field(None, description=_IGNORED)
    safety_identifier: str | None = Field(None, description=_IGNORED)
    prompt_cache_key: str | None = Field(None, description=_IGNORED)
    service_tier: str | None = Field(None, description=_IGNORED)
    frequency_penalty: Literal[0] | None = Field(
        None, description="Penalty for frequent tokens; only 0 is supported."
    )
    presence_penalty: Literal[0] | None = Field(
        None, description="Penalty for tokens that have occurred; only 0 is supported."
    )
    logit_bias: dict[str, float] | None = Field(
        None,
        max_length=0,
        description="Biases of tokens; only an empty object is supported.",
    )
    response_format: TextFormat | None = Field(
        None, description="Format of the answer; only text is supported."
    )
    modalities: list[Literal["text"]] | None = Field(
        None, description="Kinds of output; only text is supported."
    )
    tools: list[Any] | None = Field(
        None, max_length=0, description="Tools the model may call; only an empty list is supported."
    )
    tool_choice: Literal["none", "auto"] | None = Field(
        None, description="Has no effect, as there are no tools."
    )

    @field_validator("messages", mode="before")
    @classmethod
    def _only_parts_that_a_role_may_have(cls, messages: Any) -> Any:
        check_parts(messages)
        return messages

    @model_validator(mode="after")
    def _one_limit(self) -> ChatRequest:
        limits = {self.max_tokens, self.max_completion_tokens} - {None}
        if len(limits) > 1:
            raise InvalidRequest(
                "max_tokens and max_completion_tokens differ; send only one of them",
                "max_completion_tokens",
            )
        return self

    @model_validator(mode="after")
    def _top_logprobs_need_logprobs(self) -> ChatRequest:
        if self.top_logprobs and not self.logprobs:
            raise InvalidRequest("top_logprobs needs logprobs: true", "top_logprobs")
        return self

    @property
    def logprobs_wanted(self) -> int | None:
        return self.top_logprobs or 0 if self.logprobs else None

    @property
    def token_limit(self) -> int | None:
        return self.max_tokens if self.max_tokens is not None else self.max_completion_tokens

    @property
    def limit_name(self) -> str:
        return "max_tokens" if self.max_tokens is not None else "max_completion_tokens"


# -- the other routes ----------------------------------------------------------------------------

_IMAGE = (
    "Data URL of an image file (`data:image/jpeg;base64,...`), or an https URL if the server "
    "allows them."
)


class GenerateRequest(GenerationFields, StreamFields):
    image: str = Field(description=_IMAGE)
    prompt: str | None = Field(
        None,
        description="Text for the model to continue, used exactly as sent. Without a prompt, the "
        "answer is a caption.",
    )
    user: str | None = Field(None, description=_IGNORED)
    logprobs: int | None = Field(
        None,
        ge=0,
        le=MAX_TOP_LOGPROBS,
        description="Returns the log-probabilities of each generated token and of this many of "
        f"the likeliest ones, 0 to {MAX_TOP_LOGPROBS}, before penalties and temperature.",
    )

    @property
    def logprobs_wanted(self) -> int | None:
        return self.logprobs


class CaptionFields(GenerationFields):
    """The fields of /v1/caption except its images: all that a multipart body may carry."""

    prompt: str | None = Field(
        None, description="Text for the captions to continue, such as `a photo of`."
    )
    user: str | None = Field(None, description=_IGNORED)


class CaptionRequest(CaptionFields):
    image: str | None = Field(None, description=_IMAGE)
    images: list[str] | None = Field(
        None,
        min_length=1,
        max_length=MAX_IMAGES,
        description=f"URLs of 1 to {MAX_IMAGES} images. Send either `image` or `images`.",
    )

    @model_validator(mode="after")
    def _image_or_images(self) -> CaptionRequest:
        if (self.image is None) == (self.images is None):
            raise InvalidRequest('send either "image" or "images"', "image")
        return self

    @property
    def urls(self) -> list[str]:
        return self.images if self.images is not None else [self.image or ""]
