"""The bodies of requests. Everything wrong with a request is found here.

Unknown fields are errors that name the field. Fields that OpenAI's clients send without effect are
accepted with the values that have none. This module knows nothing of models and of images' content.
"""

from __future__ import annotations

import json
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
    # Accepted with the one value that changes nothing.
    n: Literal[1] | None = None
    num_beams: Literal[1] | None = None
    length_penalty: Literal[1] | None = None
    early_stopping: Literal[False] | None = None

    @field_validator("n", "num_beams", "length_penalty", "early_stopping", mode="before")
    @classmethod
    def _from_form(cls, value: object) -> object:
        """Multipart has strings only, and Literal converts none."""
        try:
            return json.loads(value) if isinstance(value, str) else value
        except ValueError:
            return value

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

    def sampling_params(self) -> SamplingParams:
        """The parameters with defaults filled in; a missing seed is drawn here, once.

        Raises:
            InvalidRequest: parameters contradict each other.
        """
        temperature = self.temperature or 0.0
        top_k = max(self.top_k or 0, 0)
        top_p = 1.0 if self.top_p is None else self.top_p
        if temperature == 0 and (top_k > 1 or top_p < 1):
            name = "top_k" if top_k > 1 else "top_p"
            raise InvalidRequest(
                f"{name} needs temperature > 0: answers are greedy otherwise", name
            )
        min_tokens = self.min_tokens or 0
        if self.token_limit is not None and min_tokens > self.token_limit:
            raise InvalidRequest(f"min_tokens is above {self.limit_name}", "min_tokens")
        stop = (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())
        return SamplingParams(
            max_tokens=self.token_limit,
            min_tokens=min_tokens,
            temperature=temperature,
            top_p=top_p,
            top_k=top_k,
            seed=secrets.randbelow(_INT64) if self.seed is None else self.seed,
            stop=stop,
            repetition_penalty=1.0 if self.repetition_penalty is None else self.repetition_penalty,
            ignore_eos=bool(self.ignore_eos),
        )


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
    logprobs: Literal[False] | None = None
    top_logprobs: Literal[0] | None = None
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
