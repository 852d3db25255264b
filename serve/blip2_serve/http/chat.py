"""Chat messages to the one image and the one prompt that BLIP-2 takes."""

from __future__ import annotations

from blip2_serve.config import ChatConfig
from blip2_serve.errors import InvalidRequest
from blip2_serve.http.schema import AssistantMessage, ImagePart, Message, TextPart, UserMessage


def prompt_of(messages: list[Message], template: ChatConfig, *, short: bool = False) -> str:
    """The prompt of a chat; empty where nothing is said but an image, which asks for a caption.

    `short` asks for a short answer to the last question, as LAVIS does for VQA.

    Raises:
        InvalidRequest: the turns are in an order that makes no question.
    """
    if messages[-1].role != "user":
        raise InvalidRequest("the last message must be the user's", "messages")
    parts: list[str] = []
    asked: list[str] | None = None  # what the user has said since the last answer
    started = False
    for i, message in enumerate(messages):
        text = _text(message)
        if isinstance(message, UserMessage):
            asked = [*(asked or []), *filter(None, [text])]
            started = True
        elif isinstance(message, AssistantMessage):
            if asked is None:
                raise InvalidRequest(
                    f"messages[{i}]: an assistant message must answer a user message",
                    "messages",
                )
            turn = template.answered if asked else template.captioned
            question, answer = " ".join(asked), text.rstrip(" .")
            parts.append(turn.format(question=question, answer=answer))
            asked = None
        elif started:
            raise InvalidRequest(
                f"messages[{i}]: {message.role} messages must stand before the first question",
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


def _text(message: Message) -> str:
    if isinstance(message.content, str):
        return message.content.strip()
    texts = [part.text for part in message.content if isinstance(part, TextPart)]
    return " ".join(text.strip() for text in texts).strip()
