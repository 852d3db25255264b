"""Answers as the OpenAPI description has them, at /docs and for generated clients.

Nothing is built from these classes: openai.py, responses.py and captions.py write the answers,
and tests hold those against this.
"""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from blip2_serve.types import FinishReason

Responses = dict[int | str, dict[str, Any]]


def responses(answer: type[BaseModel], *, stream: bool = False) -> Responses:
    """A route's `responses`, as FastAPI takes them: `answer`, or an error in OpenAI's shape."""
    success: dict[str, Any] = {"model": answer}
    if stream:
        events = {"type": "string", "description": "Server-sent events, if `stream` is true."}
        success["content"] = {"text/event-stream": {"schema": events}}
    return {200: success, **ERRORS}


class _Object(BaseModel):
    model_config = ConfigDict(extra="forbid")


_TOKEN_IDS = Field(None, description="Ids of the generated tokens, with `return_token_ids` only.")


# -- errors ----------------------------------------------------------------------------------------


class ErrorDetails(_Object):
    message: str = Field(description="What is wrong, and what to do about it.")
    type: str
    param: str | None = Field(description="The field of the request that is wrong, if it is one.")
    code: str | None


class Error(_Object):
    """OpenAI's shape of an error."""

    error: ErrorDetails


ERRORS: Responses = {
    "4XX": {"model": Error, "description": "The request must change, or wait."},
    "5XX": {"model": Error, "description": "The server failed, or is not ready."},
}


# -- chat completions ------------------------------------------------------------------------------


class Usage(_Object):
    """Token counts; the image's positions count as prompt tokens."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int


class _Completion(_Object):
    id: str
    created: int = Field(description="Unix time in seconds.")
    model: str
    usage: Usage


class Token(_Object):
    token: str
    logprob: float
    bytes: list[int]


class TokenAndOthers(Token):
    top_logprobs: list[Token]


class ChatLogprobs(_Object):
    content: list[TokenAndOthers]
    refusal: None


class ChatMessage(_Object):
    role: Literal["assistant"]
    content: str
    refusal: None


class ChatChoice(_Object):
    index: int
    message: ChatMessage
    logprobs: ChatLogprobs | None
    finish_reason: FinishReason
    token_ids: list[int] | None = _TOKEN_IDS


class ChatCompletion(_Completion):
    object: Literal["chat.completion"]
    choices: list[ChatChoice]


# -- completions -----------------------------------------------------------------------------------


class TextLogprobs(_Object):
    tokens: list[str]
    token_logprobs: list[float]
    top_logprobs: list[dict[str, float]]
    text_offset: list[int]


class TextChoice(_Object):
    index: int
    text: str
    logprobs: TextLogprobs | None
    finish_reason: FinishReason
    token_ids: list[int] | None = _TOKEN_IDS


class TextCompletion(_Completion):
    object: Literal["text_completion"]
    choices: list[TextChoice]


# -- responses -------------------------------------------------------------------------------------


class InputDetails(_Object):
    cached_tokens: int
    cache_write_tokens: int


class OutputDetails(_Object):
    reasoning_tokens: int


class ResponseUsage(_Object):
    input_tokens: int
    input_tokens_details: InputDetails
    output_tokens: int
    output_tokens_details: OutputDetails
    total_tokens: int


class ResponseText(_Object):
    type: Literal["output_text"]
    text: str
    annotations: list[Any]
    logprobs: list[TokenAndOthers]
    token_ids: list[int] | None = _TOKEN_IDS


class ResponseMessage(_Object):
    id: str
    type: Literal["message"]
    role: Literal["assistant"]
    status: Literal["completed", "incomplete"]
    content: list[ResponseText]


class Incomplete(_Object):
    reason: Literal["max_output_tokens"]


class Response(BaseModel):
    """One message with one text; what the request had is repeated, as OpenAI does."""

    id: str
    object: Literal["response"]
    created_at: int = Field(description="Unix time in seconds.")
    completed_at: int | None
    model: str
    status: Literal["completed", "incomplete"]
    incomplete_details: Incomplete | None
    error: None
    output: list[ResponseMessage]
    usage: ResponseUsage


# -- captions --------------------------------------------------------------------------------------


class Caption(_Object):
    index: int = Field(description="The image's place in the request.")
    caption: str
    finish_reason: FinishReason
    captions: list[str] | None = Field(None, description="All of them, if there are several.")
    token_ids: list[int] | None = _TOKEN_IDS


class NoCaption(_Object):
    index: int = Field(description="The image's place in the request.")
    error: ErrorDetails


class CaptionList(_Object):
    object: Literal["caption.list"]
    model: str
    data: list[Caption | NoCaption]
    usage: Usage


# -- the server ------------------------------------------------------------------------------------


class Model(_Object):
    id: str
    object: Literal["model"]
    created: int = Field(description="Unix time in seconds.")
    owned_by: str
    license: str
    limitations: str
    root: str = Field(description="The served model's own name.")
    preset: str | None = Field(description="The decoding preset that this name stands for.")


class ModelList(_Object):
    object: Literal["list"]
    data: list[Model]


class Replicas(_Object):
    running: int = Field(description="That take requests.")
    starting: int = Field(description="That will, once they have loaded.")
    stopping: int = Field(description="That finish what they have.")


class Stage(_Object):
    name: str
    replicas: Replicas
    waiting: int | None = Field(
        description="Requests, or images, that wait in its replicas; null if none of them answers."
    )
    rate_per_s: float | None = Field(
        description="Images, or tokens of answers, per second in the last five; null if none of "
        "its replicas answers."
    )
    capacity_per_s: float | None = Field(
        description="Requests, or images, per second that it could do, as measured; null while "
        "nobody knows."
    )


class Status(_Object):
    object: Literal["status"]
    model: str
    version: str
    ready: bool
    stages: list[Stage] = Field(description="The ingress first, in the order of a request's way.")


class State(_Object):
    status: Literal["ok", "ready"]
