"""The bodies of requests. Everything wrong with a request is found here.

Unknown fields are errors that name the field. Fields that OpenAI's clients send without effect are
accepted with the values that have none. This module knows nothing of models and of images' content.
"""

from __future__ import annotations

import secrets
from typing import Annotated, Any, Literal

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    StringConstraints,
    field_validator,
    model_validator,
)

from blip2_serve.errors import InvalidRequest
from blip2_serve.types import SamplingParams

MAX_STOP_STRINGS = 16
MAX_STOP_LENGTH = 256
MAX_IMAGES = 64
MAX_CHOICES = 16
MAX_BEAMS = 8
MAX_TOP_LOGPROBS = 20

# How LAVIS captions COCO and answers VQA with BLIP-2 OPT. (It counts lengths in new tokens.)
PRESETS = {
    "caption": SamplingParams(num_beams=5, max_tokens=30, min_tokens=8),
    "vqa": SamplingParams(num_beams=5, max_tokens=10, length_penalty=0.0),
}

_INT64 = 1 << 63

StopString = Annotated[str, StringConstraints(min_length=1, max_length=MAX_STOP_LENGTH)]


class _Strict(BaseModel):
    # With any constraint on strings, pydantic refuses those that are not Unicode text (half a
    # surrogate pair), which no tokenizer takes.
    model_config = ConfigDict(extra="forbid", allow_inf_nan=False, str_min_length=0)


# -- parameters ----------------------------------------------------------------------------------


class GenerationFields(_Strict):
    """How to generate: shared by all routes, and by JSON and multipart bodies."""

    model: str | None = None
    max_tokens: int | None = Field(None, ge=1)
    min_tokens: int | None = Field(None, ge=0)
    temperature: float | None = Field(None, ge=0, le=2)
    top_p: float | None = Field(None, gt=0, le=1)
    top_k: int | None = Field(None, ge=-1, description="0 or -1 keep every token")
    seed: int | None = Field(None, ge=-_INT64, lt=_INT64)
    stop: StopString | list[StopString] | None = None
    repetition_penalty: float | None = Field(None, ge=0.01, le=10)
    ignore_eos: bool | None = None
    return_token_ids: bool | None = None
    n: int | None = Field(None, ge=1, le=MAX_CHOICES)
    num_beams: int | None = Field(None, ge=1, le=MAX_BEAMS)
    length_penalty: float | None = Field(None, ge=-10, le=10)
    early_stopping: bool | Literal["never"] | None = None
    preset: Literal["caption", "vqa"] | None = Field(
        None, description="LAVIS's settings; fields that are given win over them"
    )

    @field_validator("stop")
    @classmethod
    def _few_stops(cls, value: str | list[str] | None) -> str | list[str] | None:
        if isinstance(value, list) and len(value) > MAX_STOP_STRINGS:
            raise ValueError(f"at most {MAX_STOP_STRINGS} stop strings")
        return value

    @property
    def token_limit(self) -> int | None:
        return self.max_tokens

    @property
    def limit_name(self) -> str:
        return "max_tokens"

    @property
    def logprobs_wanted(self) -> int | None:
        """How many of the likeliest tokens at each place; None for no log-probabilities."""
        return None

    def sampling_params(self) -> SamplingParams:
        """The parameters with defaults filled in; a missing seed is drawn here, once.

        Raises:
            InvalidRequest: parameters contradict each other.
        """
        preset = PRESETS[self.preset] if self.preset else SamplingParams()
        max_tokens = self.token_limit or preset.max_tokens
        min_tokens = self.min_tokens
        if min_tokens is None:
            min_tokens = min(preset.min_tokens, max_tokens or 0)
        params = SamplingParams(
            max_tokens=max_tokens,
            min_tokens=min_tokens,
            temperature=self.temperature or 0.0,
            top_p=_given(self.top_p, 1.0),
            top_k=max(self.top_k or 0, 0),
            seed=secrets.randbelow(_INT64) if self.seed is None else self.seed,
            stop=(self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ()),
            repetition_penalty=_given(self.repetition_penalty, 1.0),
            ignore_eos=bool(self.ignore_eos),
            n=self.n or 1,
            num_beams=self.num_beams or preset.num_beams,
            length_penalty=_given(self.length_penalty, preset.length_penalty),
            early_stopping=self.early_stopping or False,
            top_logprobs=self.logprobs_wanted,
        )
        self._check(params)
        return params

    def _check(self, params: SamplingParams) -> None:
        sampled, beams = params.temperature > 0, params.num_beams > 1
        if not sampled and (params.top_k > 1 or params.top_p < 1):
            name = "top_k" if params.top_k > 1 else "top_p"
            raise InvalidRequest(
                f"{name} needs temperature > 0: answers are greedy otherwise", name
            )
        if sampled and beams:
            raise InvalidRequest(
                "beam search does not sample: temperature must be 0", "temperature"
            )
        if beams and params.n > params.num_beams:
            raise InvalidRequest(f"n is above num_beams ({params.num_beams})", "n")
        if not beams and not sampled and params.n > 1:
            raise InvalidRequest("n > 1 needs temperature > 0, or num_beams of at least n", "n")
        if not beams and (self.early_stopping or self.length_penalty not in (None, 1)):
            name = "early_stopping" if self.early_stopping else "length_penalty"
            raise InvalidRequest(f"{name} needs num_beams > 1", name)
        if params.max_tokens is not None and params.min_tokens > params.max_tokens:
            raise InvalidRequest(f"min_tokens is above {self.limit_name}", "min_tokens")


def _given(value: float | None, default: float) -> float:
    return default if value is None else value


class StreamOptions(_Strict):
    include_usage: bool | None = None
    include_obfuscation: Literal[False] | None = None


class StreamFields(_Strict):
    stream: bool | None = None
    stream_options: StreamOptions | None = None

    @model_validator(mode="after")
    def _options_need_stream(self) -> StreamFields:
        if self.stream_options is not None and not self.stream:
            raise InvalidRequest("stream_options needs stream to be true", "stream_options")
        return self

    @property
    def include_usage(self) -> bool:
        return self.stream_options is not None and bool(self.stream_options.include_usage)


# -- chat ----------------------------------------------------------------------------------------


class TextPart(_Strict):
    type: Literal["text"]
    text: str


class ImageUrl(_Strict):
    url: str
    detail: Literal["auto", "low", "high", "original"] | None = None


class ImagePart(_Strict):
    type: Literal["image_url"]
    image_url: ImageUrl


UserPart = Annotated[TextPart | ImagePart, Field(discriminator="type")]


class SystemMessage(_Strict):
    role: Literal["system", "developer"]
    content: str | list[TextPart]
    name: str | None = None


class UserMessage(_Strict):
    role: Literal["user"]
    content: str | Annotated[list[UserPart], Field(min_length=1)]
    name: str | None = None


class AssistantMessage(_Strict):
    """An earlier answer. Clients send back the whole message object that they were given."""

    role: Literal["assistant"]
    content: str | list[TextPart]
    name: str | None = None
    refusal: None = None
    annotations: list[None] | None = Field(None, max_length=0)
    audio: None = None
    function_call: None = None
    tool_calls: list[None] | None = Field(None, max_length=0)


Message = Annotated[SystemMessage | UserMessage | AssistantMessage, Field(discriminator="role")]


class TextFormat(_Strict):
    type: Literal["text"]


class ChatRequest(GenerationFields, StreamFields):
    messages: list[Message] = Field(min_length=1)
    max_completion_tokens: int | None = Field(None, ge=1)
    logprobs: bool | None = None
    top_logprobs: int | None = Field(None, ge=0, le=MAX_TOP_LOGPROBS)
    # OpenAI's, without effect here.
    user: str | None = None
    metadata: dict[str, str] | None = None
    store: bool | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None
    service_tier: str | None = None
    # OpenAI's, accepted with the value that changes nothing.
    frequency_penalty: Literal[0] | None = None
    presence_penalty: Literal[0] | None = None
    logit_bias: dict[str, float] | None = Field(None, max_length=0)
    response_format: TextFormat | None = None
    modalities: list[Literal["text"]] | None = None
    tools: list[Any] | None = Field(None, max_length=0)
    tool_choice: Literal["none", "auto"] | None = None

    @model_validator(mode="after")
    def _one_limit(self) -> ChatRequest:
        limits = {self.max_tokens, self.max_completion_tokens} - {None}
        if len(limits) > 1:
            raise InvalidRequest(
                "max_tokens and max_completion_tokens differ; send one of them",
                "max_completion_tokens",
            )
        return self

    @model_validator(mode="after")
    def _top_logprobs_need_logprobs(self) -> ChatRequest:
        if self.top_logprobs and not self.logprobs:
            raise InvalidRequest("top_logprobs needs logprobs to be true", "top_logprobs")
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


class GenerateRequest(GenerationFields, StreamFields):
    image: str
    prompt: str | None = None
    user: str | None = None
    logprobs: int | None = Field(None, ge=0, le=MAX_TOP_LOGPROBS)

    @property
    def logprobs_wanted(self) -> int | None:
        return self.logprobs


class CaptionFields(GenerationFields):
    """The fields of /v1/caption beside its images: all that a multipart body may carry."""

    prompt: str | None = None
    user: str | None = None


class CaptionRequest(CaptionFields):
    image: str | None = None
    images: list[str] | None = Field(None, min_length=1, max_length=MAX_IMAGES)

    @model_validator(mode="after")
    def _image_or_images(self) -> CaptionRequest:
        if (self.image is None) == (self.images is None):
            raise InvalidRequest('send either "image" or "images"', "image")
        return self

    @property
    def urls(self) -> list[str]:
        return self.images if self.images is not None else [self.image or ""]
