"""The bodies of requests. Everything wrong with a request's form is found here.

Unknown fields are errors that name the field. Those of OpenAI's that have no effect here are in
`compatibility`. null always means that a field is not given. This module knows neither the model
nor what is in an image.

Descriptions appear on /docs and in the documentation, so each stands alone.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, field_validator, model_validator

from blip2_serve.errors import InvalidRequest
from blip2_serve.http.chat import Message, check_parts
from blip2_serve.http.compatibility import OpenAIFields, because
from blip2_serve.http.schema_generation import GenerationFields
from blip2_serve.http.validation import MOST_ITEMS, Strict

MAX_IMAGES = 64
MAX_TOP_LOGPROBS = 20


class StreamOptions(Strict):
    include_usage: bool | None = Field(
        None,
        description="Whether to send the token counts of the whole request in a last chunk, "
        "which has no choices.",
    )
    include_obfuscation: bool | None = Field(
        None, description="Whether to pad chunks to hide their length. Has no effect."
    )


class ChunkOptions(StreamOptions):
    """What this server's streams can tell besides OpenAI's, each in chunks without choices."""

    include_timing: bool | None = Field(
        None,
        description="Whether the last chunk, which has no choices, tells where the time went.",
    )
    include_beams: bool | None = Field(
        None,
        description="Whether to send the beams of a search at each step, in chunks without "
        "choices. No effect without a beam search.",
    )
    include_events: bool | None = Field(
        None,
        description="Whether to tell, in a chunk without choices, that a replica was lost and "
        "another one goes on with the answer.",
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


class ChunkFields(StreamFields):
    stream_options: ChunkOptions | None = Field(
        None, description="Options of a streamed answer. Needs `stream`."
    )

    @property
    def included(self) -> frozenset[str]:
        """What a streamed answer tells besides itself: options by their names after `include_`."""
        options = self.stream_options.model_dump() if self.stream_options else {}
        return frozenset(name.removeprefix("include_") for name, on in options.items() if on)


# -- chat ----------------------------------------------------------------------------------------


class ChatRequest(GenerationFields, OpenAIFields, ChunkFields):
    messages: list[Message] = Field(
        min_length=1,
        max_length=MOST_ITEMS,
        description="The chat so far, ending with a user message. One image is needed, in any "
        "user message; later turns may repeat it. A chat without a question asks for a caption.",
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

    @field_validator("messages", mode="before")
    @classmethod
    def _only_parts_that_a_role_may_have(cls, messages: Any) -> Any:
        check_parts(messages)
        return messages

    @model_validator(mode="after")
    def _top_logprobs_need_logprobs(self) -> ChatRequest:
        if self.top_logprobs and not self.logprobs:
            raise InvalidRequest("top_logprobs needs logprobs: true", "top_logprobs")
        return self

    @property
    def logprobs_wanted(self) -> int | None:
        return self.top_logprobs or 0 if self.logprobs else None


# -- the other routes ----------------------------------------------------------------------------

_IMAGE = (
    "Data URL of an image file (`data:image/jpeg;base64,...`), or an https URL if the server "
    "allows them."
)


class GenerateRequest(GenerationFields, OpenAIFields, ChunkFields):
    image: str = Field(description=_IMAGE)
    prompt: str | None = Field(
        None,
        description="Text for the model to continue, used exactly as sent. Without a prompt, the "
        "answer is a caption.",
    )
    logprobs: int | None = Field(
        None,
        ge=0,
        le=MAX_TOP_LOGPROBS,
        description="Returns the log-probabilities of each generated token and of this many of "
        f"the likeliest ones, 0 to {MAX_TOP_LOGPROBS}, before penalties and temperature.",
    )
    top_logprobs: (
        Annotated[
            Literal[0],
            because("/v1/generate lists the likeliest tokens by logprobs: send a number"),
        ]
        | None
    ) = Field(None, description="Use `logprobs`: only 0 is accepted.")

    @field_validator("logprobs", mode="before")
    @classmethod
    def _false_is_none(cls, value: Any) -> Any:
        return None if value is False else value

    @property
    def logprobs_wanted(self) -> int | None:
        return self.logprobs


_NO_LOGPROBS = "captions come without log-probabilities; use /v1/chat/completions for them"
_NO_STREAM = "captions are not streamed; use /v1/chat/completions for that"


class CaptionFields(GenerationFields, OpenAIFields):
    """The fields of /v1/caption except its images: all that a multipart body may carry."""

    samples_by_default = False

    prompt: str | None = Field(
        None, description="Text for the captions to continue, such as `a photo of`."
    )
    stream: Annotated[Literal[False], because(_NO_STREAM)] | None = Field(
        None, description="Captions are not streamed: only `false` is accepted."
    )
    stream_options: Annotated[None, because(_NO_STREAM)] = Field(
        None, description="Captions are not streamed: only null is accepted."
    )
    logprobs: Annotated[Literal[False], because(_NO_LOGPROBS)] | None = Field(
        None, description="Captions come without log-probabilities: only `false` is accepted."
    )
    top_logprobs: Annotated[Literal[0], because(_NO_LOGPROBS)] | None = Field(
        None, description="Captions come without log-probabilities: only 0 is accepted."
    )


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
