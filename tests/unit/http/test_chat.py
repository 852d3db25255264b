"""The prompt and the image of a chat."""

from __future__ import annotations

from typing import Any

import pytest

from blip2_serve.errors import InvalidRequest
from blip2_serve.http.chat import image_urls, prompt_of
from blip2_serve.http.schema import ChatRequest
from blip2_serve.ingress_config import ChatConfig

IMAGE = {"type": "image_url", "image_url": {"url": "data:image/png;base64,aGk="}}
IMAGE_ONLY = {"role": "user", "content": [IMAGE]}


def says(role: str, text: str) -> dict[str, Any]:
    return {"role": role, "content": text}


def text_part(text: str) -> dict[str, Any]:
    return {"type": "text", "text": text}


def prompt(*messages: dict[str, Any], template: ChatConfig | None = None) -> str:
    request = ChatRequest.model_validate({"messages": messages})
    return prompt_of(request.messages, template or ChatConfig())


@pytest.mark.parametrize(
    ("messages", "expected"),
    [
        pytest.param([says("user", "Q1")], "Question: Q1 Answer:", id="one question"),
        pytest.param(
            [says("user", "Q1"), says("assistant", "A1"), says("user", "Q2")],
            "Question: Q1 Answer: A1. Question: Q2 Answer:",
            id="a question after an answer",
        ),
        pytest.param(
            [says("user", "Q1"), says("assistant", "A1. "), says("user", "Q2")],
            "Question: Q1 Answer: A1. Question: Q2 Answer:",
            id="no second full stop after an answer",
        ),
        pytest.param(
            [
                says("user", "Q1"),
                says("assistant", "A1"),
                says("user", "Q2"),
                says("assistant", "A2"),
                says("user", "Q3"),
            ],
            "Question: Q1 Answer: A1. Question: Q2 Answer: A2. Question: Q3 Answer:",
            id="three turns",
        ),
        pytest.param([IMAGE_ONLY], "", id="an image alone asks for a caption"),
        pytest.param(
            [{"role": "user", "content": [IMAGE, text_part("  ")]}],
            "",
            id="an image with blank text asks for a caption",
        ),
        pytest.param(
            [IMAGE_ONLY, says("assistant", "a red circle"), says("user", "Q1")],
            "a red circle. Question: Q1 Answer:",
            id="a question after a caption",
        ),
        pytest.param(
            [IMAGE_ONLY, says("user", "Q1")],
            "Question: Q1 Answer:",
            id="an image, then a question",
        ),
        pytest.param(
            [says("user", "one"), says("user", "two")],
            "Question: one two Answer:",
            id="two messages in a row are one question",
        ),
        pytest.param(
            [{"role": "user", "content": [text_part(" one "), IMAGE, text_part("two")]}],
            "Question: one two Answer:",
            id="texts around an image are joined",
        ),
        pytest.param(
            [says("system", "Be brief."), says("developer", "In English."), says("user", "Q1")],
            "Be brief. In English. Question: Q1 Answer:",
            id="system and developer texts come first",
        ),
        pytest.param(
            [says("system", ""), says("user", "Q1")],
            "Question: Q1 Answer:",
            id="an empty system text leaves no trace",
        ),
        pytest.param(
            [says("system", "A photo of"), IMAGE_ONLY],
            "A photo of",
            id="a system text starts the caption",
        ),
        pytest.param(
            [
                says("system", "{text} {0}"),
                says("user", "{question}"),
                says("assistant", "{answer} {}"),
                says("user", "{{x}}"),
            ],
            "{text} {0} Question: {question} Answer: {answer} {}. Question: {{x}} Answer:",
            id="braces are kept",
        ),
    ],
)
def test_a_chat_becomes_the_prompt(messages: list[dict[str, Any]], expected: str) -> None:
    assert prompt(*messages) == expected


def test_the_templates_can_be_configured() -> None:
    template = ChatConfig(answered="{question}|{answer}|", asked="{question}|")

    asked = [says("user", "Q1"), says("assistant", "A1"), says("user", "Q2")]
    assert prompt(*asked, template=template) == "Q1|A1|Q2|"


@pytest.mark.parametrize(
    ("messages", "expected"),
    [
        pytest.param([says("user", "Q1")], "Question: Q1 Short answer:", id="one question"),
        pytest.param(
            [says("user", "Q1"), says("assistant", "A1"), says("user", "Q2")],
            "Question: Q1 Answer: A1. Question: Q2 Short answer:",
            id="only the last of two questions",
        ),
        pytest.param([IMAGE_ONLY], "", id="a caption stays a caption"),
    ],
)
def test_only_the_last_question_asks_for_a_short_answer(
    messages: list[dict[str, Any]], expected: str
) -> None:
    request = ChatRequest.model_validate({"messages": messages})

    assert prompt_of(request.messages, ChatConfig(), preset="vqa") == expected


@pytest.mark.parametrize(
    "messages",
    [
        pytest.param([says("user", "Q"), says("assistant", "A")], id="assistant message last"),
        pytest.param([says("system", "S")], id="only a system message"),
        pytest.param([says("assistant", "A")], id="only an assistant message"),
        pytest.param([says("assistant", "")], id="only an empty assistant message"),
        pytest.param(
            [says("user", "Q"), says("assistant", "A"), says("system", "S")],
            id="assistant message last but for a system message",
        ),
        pytest.param(
            [says("user", "Q"), says("assistant", "A"), says("assistant", "")],
            id="assistant message last but for an empty one",
        ),
    ],
)
def test_messages_that_lead_to_no_question_are_refused(
    messages: list[dict[str, Any]],
) -> None:
    with pytest.raises(InvalidRequest) as caught:
        prompt(*messages)

    assert caught.value.param == "messages"


def test_images_are_found_in_every_user_message_in_order() -> None:
    def with_images(*urls: str) -> dict[str, Any]:
        parts = [{"type": "image_url", "image_url": {"url": url}} for url in urls]
        return {"role": "user", "content": [text_part("Q"), *parts]}

    messages = [with_images("a", "b"), says("assistant", "A"), says("user", "Q"), with_images("c")]
    request = ChatRequest.model_validate({"messages": messages})

    assert image_urls(request.messages) == ["a", "b", "c"]
