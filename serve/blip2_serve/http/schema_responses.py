"""The body of /v1/responses, and its items as the messages of a chat.

Clients send back what they have received, so an item may have fields that say nothing here.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, ConfigDict, Discriminator, Field, Tag, model_validator

from blip2_serve.errors import InvalidRequest
from blip2_serve.http.chat import (
    AssistantMessage,
    ImagePart,
    ImageUrl,
    Message,
    SystemMessage,
    TextPart,
    UserMessage,
)
from blip2_serve.http.compatibility import OpenAIFields, ShortText, because
from blip2_serve.http.schema import MAX_TOP_LOGPROBS, StreamFields
from blip2_serve.http.schema_generation import GenerationFields
from blip2_serve.http.validation import FEW, Strict

LOGPROBS = "message.output_text.logprobs"

_IGNORED = "Has no effect; accepted because OpenAI's clients send it."
_ECHOED = "Has no effect; clients send back what they received."
_STATELESS = "nothing is stored here; send the whole history as input"
_NO_TEMPLATES = "there are no stored prompts here; send the text as input or instructions"
_NO_BACKGROUND = "a response cannot be computed in the background; leave background out"
_NO_COMPACTION = "a history cannot be compacted here; leave context_management out"
_ONE_ANSWER = "a response has one answer; use /v1/chat/completions for several"
_OTHER_NAME = "the limit of a response is named max_output_tokens"
_TEXT_ONLY = (
    'this model cannot be held to JSON or a schema; leave format out, or send {"type": "text"}'
)


# -- the parts of a message ------------------------------------------------------------------------


def _known(*kinds: str) -> BeforeValidator:
    """Refuses parts of other types than these, and says what to send."""

    def check(part: Any) -> Any:
        kind = part.get("type") if isinstance(part, dict) else None
        if kind == "input_image" and kind not in kinds:
            raise ValueError("send the image in a message with the role user")
        if isinstance(kind, str) and kind not in kinds:
            raise ValueError(f"a part of the type {kind} is not taken; send {' or '.join(kinds)}")
        return part

    return BeforeValidator(check)


def _plain_url(value: Any) -> Any:
    """The URL of an image as chat completions have it."""
    return value["url"] if isinstance(value, dict) and [*value] == ["url"] else value


class InputText(Strict):
    type: Literal["input_text"]
    text: str = Field(description="Part of the message's text.")
    prompt_cache_breakpoint: dict[str, ShortText] | None = Field(None, description=_IGNORED)


class InputImage(Strict):
    type: Literal["input_image"]
    file_id: Annotated[None, because("no files are stored here; send the image as image_url")] = (
        Field(None, description="Id of a stored file. There is none: only null is accepted.")
    )
    image_url: Annotated[str, BeforeValidator(_plain_url, json_schema_input_type=str)] = Field(
        description="Data URL of an image file (`data:image/jpeg;base64,...`), or an https URL if "
        "the server allows them."
    )
    detail: ShortText | None = Field(
        None, description="Resolution to use. Has no effect: the model has one input size."
    )
    prompt_cache_breakpoint: dict[str, ShortText] | None = Field(None, description=_IGNORED)


class OutputText(Strict):
    type: Literal["output_text"]
    text: str = Field(description="Text of an earlier answer.")
    annotations: list[Any] | None = Field(None, description=_ECHOED)
    logprobs: list[Any] | None = Field(None, description=_ECHOED)
    token_ids: list[int] | None = Field(None, description=_ECHOED)


class OutputRefusal(Strict):
    type: Literal["refusal"]
    refusal: str = Field(description="Text of an earlier answer that refused.")


_UserPart = Annotated[
    Annotated[InputText | InputImage, Field(discriminator="type")],
    _known("input_text", "input_image"),
]
_SystemPart = Annotated[InputText, _known("input_text")]
_AssistantPart = Annotated[
    Annotated[OutputText | OutputRefusal | InputText, Field(discriminator="type")],
    _known("output_text", "refusal", "input_text"),
]


# -- items -----------------------------------------------------------------------------------------


class _Item(Strict):
    type: Literal["message"] | None = None
    id: str | None = Field(None, description=_ECHOED)
    status: ShortText | None = Field(None, description=_ECHOED)
    phase: ShortText | None = Field(None, description=_ECHOED)


class UserItem(_Item):
    """A question, an image or both."""

    role: Literal["user"]
    content: str | Annotated[list[_UserPart], Field(min_length=1), FEW] = Field(
        description="Text of the message, or a list of texts and images."
    )

    def as_message(self) -> Message:
        if isinstance(self.content, str):
            return UserMessage(role="user", content=self.content)
        return UserMessage(role="user", content=[*map(_as_chat_part, self.content)])


class SystemItem(_Item):
    """Text that is put before the first question."""

    role: Literal["system", "developer"]
    content: str | Annotated[list[_SystemPart], FEW] = Field(description="Text of the message.")

    def as_message(self) -> Message:
        return SystemMessage(role=self.role, content=_joined(self.content))


class AssistantItem(_Item):
    """An earlier answer."""

    role: Literal["assistant"]
    content: str | Annotated[list[_AssistantPart], FEW] = Field(description="Text of the answer.")

    def as_message(self) -> Message:
        return AssistantMessage(role="assistant", content=_joined(self.content))


class ReasoningItem(Strict):
    """What a reasoning model thought. Left out of the prompt."""

    model_config = ConfigDict(extra="allow")

    type: Literal["reasoning"]

    def as_message(self) -> None:
        return None


def _as_chat_part(part: InputText | InputImage) -> TextPart | ImagePart:
    if isinstance(part, InputText):
        return TextPart(type="text", text=part.text)
    return ImagePart(type="image_url", image_url=ImageUrl(url=part.image_url))


def _joined(content: str | list[Any]) -> str:
    if isinstance(content, str):
        return content
    texts = (p.refusal if isinstance(p, OutputRefusal) else p.text for p in content)
    return " ".join(filter(None, map(str.strip, texts)))


def _known_item(item: Any) -> Any:
    kind = item.get("type") if isinstance(item, dict) else None
    if kind == "item_reference":
        raise ValueError(_STATELESS)
    if kind not in (None, "message", "reasoning"):
        raise ValueError(f"an item of the type {kind} is not taken; send messages")
    return item


def _tag(item: Any) -> Any:
    if not isinstance(item, dict):
        return getattr(item, "role", None)
    return "reasoning" if item.get("type") == "reasoning" else item.get("role")


_Input = Annotated[
    Annotated[
        Annotated[UserItem, Tag("user")]
        | Annotated[SystemItem, Tag("system")]
        | Annotated[SystemItem, Tag("developer")]
        | Annotated[AssistantItem, Tag("assistant")]
        | Annotated[ReasoningItem, Tag("reasoning")],
        Discriminator(
            _tag,
            custom_error_type="role",
            custom_error_message="a message needs the role user, assistant, system or developer",
        ),
    ],
    BeforeValidator(_known_item),
]


# -- the request -----------------------------------------------------------------------------------


class TextConfig(Strict):
    format: (
        Annotated[dict[Literal["type"], Literal["text"]], Field(min_length=1), because(_TEXT_ONLY)]
        | None
    ) = Field(None, description='Format of the answer: only `{"type": "text"}` is accepted.')
    verbosity: ShortText | None = Field(None, description=_IGNORED)


class ResponsesRequest(GenerationFields, OpenAIFields, StreamFields):
    input: str | Annotated[list[_Input], FEW] = Field(
        description="Messages with text (`input_text`, and `output_text` in earlier answers) and "
        "one image (`input_image`), ending with a user message; a string is the text of one. A "
        "chat without a question asks for a caption.",
    )
    instructions: str | None = Field(
        None, description="Text that is put before all others, as a system message is."
    )
    max_output_tokens: int | None = Field(
        None,
        ge=1,
        description="Maximum number of tokens to generate, cut to what the prompt leaves of the "
        "model's context and of the KV cache.",
    )
    max_tokens: Annotated[None, because(_OTHER_NAME)] = Field(
        None, description="Use `max_output_tokens`: only null is accepted."
    )
    max_completion_tokens: Annotated[None, because(_OTHER_NAME)] = Field(
        None, description="Use `max_output_tokens`: only null is accepted."
    )
    n: Annotated[Literal[1], because(_ONE_ANSWER)] | None = Field(
        None, description="Number of answers: only 1 is accepted."
    )
    include: list[ShortText] | None = Field(
        None,
        description=f"`{LOGPROBS}` returns the log-probability of each generated token, before "
        "penalties and temperature. Other values have no effect.",
    )
    top_logprobs: int | None = Field(
        None,
        ge=0,
        le=MAX_TOP_LOGPROBS,
        description="Number of likeliest tokens to return at each position with their "
        f"log-probabilities, 0 to {MAX_TOP_LOGPROBS}. Above 0, includes log-probabilities.",
    )
    text: TextConfig | None = Field(None, description="Format of the answer: only text.")
    previous_response_id: Annotated[None, because(_STATELESS)] = Field(
        None, description="Id of a stored response. There is none: only null is accepted."
    )
    conversation: Annotated[None, because(_STATELESS)] = Field(
        None, description="Id of a stored conversation. There is none: only null is accepted."
    )
    prompt: Annotated[None, because(_NO_TEMPLATES)] = Field(
        None, description="Id of a stored prompt. There is none: only null is accepted."
    )
    background: Annotated[Literal[False], because(_NO_BACKGROUND)] | None = Field(
        None, description="Whether to answer later: only `false` is accepted."
    )
    context_management: (
        Annotated[list[Any], Field(max_length=0), because(_NO_COMPACTION)] | None
    ) = Field(None, description="When to shorten the history: only an empty list is accepted.")
    truncation: ShortText | None = Field(
        None, description="Has no effect: a history that is too long is always an error."
    )
    reasoning: dict[str, Any] | None = Field(None, description=_IGNORED)
    max_tool_calls: int | None = Field(None, description=_IGNORED)
    background_options: dict[str, Any] | None = Field(None, description=_IGNORED)
    access_programs: dict[str, Any] | None = Field(None, description=_IGNORED)
    image: dict[str, Any] | None = Field(None, description=_IGNORED)

    @model_validator(mode="after")
    def _ends_with_a_question(self) -> ResponsesRequest:
        items = [] if isinstance(self.input, str) else [*enumerate(self.input)]
        for i, item in reversed(items):
            if isinstance(item, UserItem):
                break
            if isinstance(item, AssistantItem) and _joined(item.content):
                raise InvalidRequest(
                    f"input[{i}]: the last message must have the role user", "input"
                )
        return self

    @property
    def messages(self) -> list[Message]:
        """The instructions and the input as a chat."""
        said = [SystemMessage(role="system", content=self.instructions or "")]
        if isinstance(self.input, str):
            return [*said, UserMessage(role="user", content=self.input)]
        messages = (item.as_message() for item in self.input)
        return [*said, *(message for message in messages if message)]

    @property
    def token_limit(self) -> int | None:
        return self.max_output_tokens

    @property
    def limit_name(self) -> str:
        return "max_output_tokens"

    @property
    def logprobs_wanted(self) -> int | None:
        asked = self.top_logprobs or LOGPROBS in (self.include or ())
        return self.top_logprobs or 0 if asked else None
