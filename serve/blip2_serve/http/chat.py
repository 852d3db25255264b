"""The messages of a chat, and what BLIP-2 takes instead: one image and one prompt."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field

from blip2_serve.errors import InvalidRequest
from blip2_serve.http.images import ImageReader, is_data_url
from blip2_serve.http.presets import Preset, default_prompt, without_instructions
from blip2_serve.http.validation import FEW, MOST_ITEMS, Strict
from blip2_serve.ingress_config import ChatConfig

_PARTICIPANT = "Name of the author. Has no effect."
_ECHOED = "Has no effect; clients send back what another server answered."
_NO_TOOLS = "Empty or null: the model calls no tools."
_NOT_TAKEN = {
    "input_audio": "audio",
    "audio": "audio",
    "audio_url": "audio",
    "file": "a file",
    "input_file": "a file",
    "video": "a video",
    "video_url": "a video",
    "input_video": "a video",
}


class TextPart(Strict):
    type: Literal["text"]
    text: str = Field(description="Part of the message's text.")


class RefusalPart(Strict):
    type: Literal["refusal"]
    refusal: str = Field(description="Text of an earlier answer that refused.")


class ImageUrl(Strict):
    url: str = Field(
        description="Data URL of an image file (`data:image/jpeg;base64,...`), or an https URL if "
        "the server allows them."
    )
    detail: Literal["auto", "low", "high", "original"] | None = Field(
        None, description="Resolution to use. Has no effect: the model has one input size."
    )


def _as_object(url: Any) -> Any:
    return {"url": url} if isinstance(url, str) else url


class ImagePart(Strict):
    type: Literal["image_url"]
    image_url: Annotated[
        ImageUrl, BeforeValidator(_as_object, json_schema_input_type=ImageUrl | str)
    ] = Field(description="The image: an object with its URL, or the URL itself.")


UserPart = Annotated[TextPart | ImagePart, Field(discriminator="type")]
AssistantPart = Annotated[TextPart | RefusalPart, Field(discriminator="type")]


class _Author(Strict):
    """Fields of every message; some clients send all of them, as null."""

    name: str | None = Field(None, description=_PARTICIPANT)
    function_call: None = Field(None, description="Always null: the model calls no tools.")
    tool_calls: list[None] | None = Field(None, max_length=0, description=_NO_TOOLS)
    tool_call_id: None = Field(None, description="Always null: the model calls no tools.")


class SystemMessage(_Author):
    """Text that is put before the first question, wherever the message is."""

    role: Literal["system", "developer"]
    content: str | Annotated[list[TextPart], FEW] | None = Field(
        None, description="Text of the message."
    )


class UserMessage(_Author):
    """A question, an image or both."""

    role: Literal["user"]
    content: str | Annotated[list[UserPart], Field(min_length=1), FEW] = Field(
        description="Text of the message, or a list of texts and images."
    )


class AssistantMessage(_Author):
    """An earlier answer. Clients may send back the whole message object that they received."""

    role: Literal["assistant"]
    content: str | Annotated[list[AssistantPart], FEW] | None = Field(
        None, description="Text of the answer. A message without text is passed over."
    )
    refusal: str | None = Field(None, description="Text of the answer if there is no other.")
    annotations: list[Any] | None = Field(None, description=_ECHOED)
    audio: None = Field(None, description="Always null.")
    parsed: Any = Field(None, description=_ECHOED)
    reasoning: Any = Field(None, description=_ECHOED)
    reasoning_content: Any = Field(None, description=_ECHOED)
    reasoning_details: Any = Field(None, description=_ECHOED)
    thinking_blocks: Any = Field(None, description=_ECHOED)
    provider_specific_fields: Any = Field(None, description=_ECHOED)


Message = Annotated[SystemMessage | UserMessage | AssistantMessage, Field(discriminator="role")]


def check_parts(messages: Any) -> None:
    """Finds what a chat cannot have, in messages as they were sent: their form may be wrong.

    Raises:
        InvalidRequest: a part of a message is of a kind that the model or the role cannot take.
    """
    for i, message in enumerate(messages[:MOST_ITEMS] if isinstance(messages, list) else []):
        role = message.get("role") if isinstance(message, dict) else None
        if role in ("tool", "function"):
            raise InvalidRequest(
                f"messages[{i}]: leave {role} messages out; the model calls no tools",
                f"messages[{i}].role",
            )
        content = message.get("content") if isinstance(message, dict) else None
        for j, part in enumerate(content[:MOST_ITEMS] if isinstance(content, list) else []):
            _check_part(part, role, f"messages[{i}].content[{j}]")


def _check_part(part: Any, role: Any, place: str) -> None:
    kind = part.get("type") if isinstance(part, dict) else None
    if not isinstance(kind, str):
        return
    if kind in _NOT_TAKEN:
        raise InvalidRequest(
            f"{place}: {_NOT_TAKEN[kind]} cannot be read; send text and one image", place
        )
    if kind == "image_url" and role in ("system", "developer", "assistant"):
        raise InvalidRequest(
            f"{place}: an image in the {role} message cannot be read; send it in a user message",
            place,
        )


def prompt_of(
    messages: list[Message],
    template: ChatConfig,
    *,
    preset: Preset | None = None,
    rewrite: bool = False,
) -> str:
    """The prompt of a chat.

    Questions in a row are joined, and so are answers. A message without text or image is passed
    over. If the user only sends an image, the prompt is empty, which asks for a caption, or the
    preset's own. `rewrite`, for aliases of the model, makes it the preset's own whatever the
    texts are: "caption" leaves all of them out, "vqa" system texts and trailing instructions.

    Raises:
        InvalidRequest: the messages do not lead up to a question or an image.
    """
    _check_last(messages)
    if rewrite and preset == "caption":
        return default_prompt(preset)
    parts: list[str] = []
    if not rewrite:
        system = (text for m in messages if isinstance(m, SystemMessage) and (text := _text(m)))
        parts += [template.preamble.format(text=text) for text in system]
    instructions = template.vqa_instructions if rewrite else ()
    *answered, last = _turns(messages)
    for asked, answers in answered:
        question = without_instructions(" ".join(asked), instructions)
        answer = " ".join(answers).rstrip(" .")
        turn = template.answered if question else template.captioned
        parts.append(turn.format(question=question, answer=answer))
    if question := without_instructions(" ".join(last[0]), instructions):
        asking = template.asked_short if preset == "vqa" else template.asked
        parts.append(asking.format(question=question))
    return "".join(parts).rstrip(" ") or default_prompt(preset)


def _check_last(messages: list[Message]) -> None:
    spoken = [
        (i, message)
        for i, message in enumerate(messages)
        if not isinstance(message, SystemMessage) and not _is_empty(message)
    ]
    if not spoken:
        raise InvalidRequest("the chat has no user message; add one", "messages")
    i, last = spoken[-1]
    if not isinstance(last, UserMessage):
        raise InvalidRequest(
            f"messages[{i}]: the last message must have the role user; to have a text continued, "
            "send it as the prompt of /v1/generate",
            "messages",
        )


def _turns(messages: list[Message]) -> list[tuple[list[str], list[str]]]:
    """Texts of the user and then of the assistant, turn by turn; the last has no answer."""
    turns: list[tuple[list[str], list[str]]] = [([], [])]
    for message in messages:
        if isinstance(message, SystemMessage) or _is_empty(message):
            continue
        if isinstance(message, AssistantMessage):
            turns[-1][1].append(_text(message))
            continue
        if turns[-1][1]:
            turns.append(([], []))
        turns[-1][0].extend(filter(None, [_text(message)]))
    return turns


def _is_empty(message: Message) -> bool:
    return isinstance(message, AssistantMessage) and not _text(message).strip(" .")


def image_urls(messages: list[Message]) -> list[str]:
    """Every image URL of a chat, in order."""
    return [
        part.image_url.url
        for message in messages
        if message.role == "user" and not isinstance(message.content, str)
        for part in message.content
        if isinstance(part, ImagePart)
    ]


async def image_of(messages: list[Message], images: ImageReader) -> bytes:
    """The image file of a chat. Later turns may send the same image again.

    Raises:
        InvalidRequest: the chat has no image or different ones, or the image cannot be read.
    """
    urls = list(dict.fromkeys(image_urls(messages)))
    if not urls:
        raise InvalidRequest("the chat has no image; send one in a user message", "messages")
    if len(urls) > 1 and not all(map(is_data_url, urls)):
        for url in urls:
            images.check_url(url, "messages")
        # Refused before anything is downloaded.
        raise InvalidRequest(
            "the chat has several image URLs; send one image, with the same URL in every turn",
            "messages",
        )
    data, *others = [await images.fetch(url, "messages") for url in urls]
    if any(other != data for other in others):
        raise InvalidRequest("the chat has several different images; send only one", "messages")
    return data


def _text(message: Message) -> str:
    content = message.content
    if isinstance(message, AssistantMessage) and not content:
        content = message.refusal
    if content is None or isinstance(content, str):
        return (content or "").strip()
    texts = [
        part.refusal if isinstance(part, RefusalPart) else part.text
        for part in content
        if not isinstance(part, ImagePart)
    ]
    return " ".join(filter(None, map(str.strip, texts)))
