"""The messages of a chat, and what BLIP-2 takes instead: one image and one prompt."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from blip2_serve.config import ChatConfig
from blip2_serve.errors import InvalidRequest
from blip2_serve.http.images import ImageReader, is_data_url
from blip2_serve.http.validation import Strict

_PARTICIPANT = "Name of the author. Has no effect."


class TextPart(Strict):
    type: Literal["text"]
    text: str = Field(description="Part of the message's text.")


class ImageUrl(Strict):
    url: str = Field(
        description="Data URL of an image file (`data:image/jpeg;base64,...`), or an https URL if "
        "the server allows them."
    )
    detail: Literal["auto", "low", "high", "original"] | None = Field(
        None, description="Resolution to use. Has no effect: the model has one input size."
    )


class ImagePart(Strict):
    type: Literal["image_url"]
    image_url: ImageUrl = Field(description="The image.")


UserPart = Annotated[TextPart | ImagePart, Field(discriminator="type")]


class SystemMessage(Strict):
    """Text that is put before the first question."""

    role: Literal["system", "developer"]
    content: str | list[TextPart] = Field(description="Text of the message.")
    name: str | None = Field(None, description=_PARTICIPANT)


class UserMessage(Strict):
    """A question, an image or both."""

    role: Literal["user"]
    content: str | Annotated[list[UserPart], Field(min_length=1)] = Field(
        description="Text of the message, or a list of texts and images."
    )
    name: str | None = Field(None, description=_PARTICIPANT)


class AssistantMessage(Strict):
    """An earlier answer. Clients may send back the whole message object that they received."""

    role: Literal["assistant"]
    content: str | list[TextPart] = Field(description="Text of the answer.")
    name: str | None = Field(None, description=_PARTICIPANT)
    refusal: None = Field(None, description="Always null.")
    annotations: list[None] | None = Field(None, max_length=0, description="Empty or null.")
    audio: None = Field(None, description="Always null.")
    function_call: None = Field(None, description="Always null.")
    tool_calls: list[None] | None = Field(None, max_length=0, description="Empty or null.")


Message = Annotated[SystemMessage | UserMessage | AssistantMessage, Field(discriminator="role")]


def prompt_of(messages: list[Message], template: ChatConfig, *, short: bool = False) -> str:
    """The prompt of a chat; empty, which asks for a caption, if the user only sends an image.

    `short` asks for a short answer to the last question, as LAVIS does for VQA.

    Raises:
        InvalidRequest: the order of the messages does not lead up to a question.
    """
    if messages[-1].role != "user":
        raise InvalidRequest("the last message must have the role user", "messages")
    parts: list[str] = []
    asked: list[str] | None = None  # the user's texts since the last answer
    started = False
    for i, message in enumerate(messages):
        text = _text(message)
        if isinstance(message, UserMessage):
            asked = [*(asked or []), *filter(None, [text])]
            started = True
        elif isinstance(message, AssistantMessage):
            if asked is None:
                raise InvalidRequest(
                    f"messages[{i}]: an assistant message must follow a user message",
                    "messages",
                )
            turn = template.answered if asked else template.captioned
            question, answer = " ".join(asked), text.rstrip(" .")
            parts.append(turn.format(question=question, answer=answer))
            asked = None
        elif started:
            raise InvalidRequest(
                f"messages[{i}]: put {message.role} messages before the first user message",
                "messages",
            )
        elif text:
            parts.append(template.preamble.format(text=text))
    if asked:
        asking = template.asked_short if short else template.asked
        parts.append(asking.format(question=" ".join(asked)))
    return "".join(parts).rstrip(" ")


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
    if isinstance(message.content, str):
        return message.content.strip()
    texts = [part.text for part in message.content if isinstance(part, TextPart)]
    return " ".join(text.strip() for text in texts).strip()
