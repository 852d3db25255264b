"""The page of a real server, behind a route prefix, in a real browser."""

from __future__ import annotations

import base64
from collections.abc import Iterator

import pytest
from playwright.sync_api import Page, expect

from support.browser import running_browser
from support.server import App

QUESTION = "how many shapes are there?"


@pytest.fixture(scope="module")
def page() -> Iterator[Page]:
    with running_browser() as browser:
        page = browser.new_page()
        yield page


def test_what_the_page_shows_is_what_the_api_answers(page: Page, demo: App) -> None:
    said: list[str] = []
    page.on("console", lambda message: said.append(message.text))
    page.on("pageerror", lambda error: said.append(str(error)))
    page.goto(demo.url)
    picture = page.request.get(f"{demo.url}/page/examples/shapes-2.png").body()
    url = f"data:image/png;base64,{base64.b64encode(picture).decode()}"
    image = {"type": "image_url", "image_url": {"url": url}}

    page.get_by_role("button", name="an orange cross").click()
    caption = chat(demo, [{"role": "user", "content": [image]}])
    expect(page.locator(".answer")).to_have_text(caption)

    page.get_by_text("How to answer").click()
    page.get_by_label("Beam search").check()
    page.get_by_label("Question about the picture").fill(QUESTION)
    page.keyboard.press("Enter")
    asked = [{"role": "user", "content": [image, {"type": "text", "text": QUESTION}]}]
    expect(page.locator(".answer").last).to_have_text(chat(demo, asked, num_beams=5))
    page.locator(".turn").last.get_by_text("Beams", exact=True).click()
    best = page.locator(".turn").last.locator(".beams li")
    expect(best).to_have_count(5)
    expect(best.first.locator(".text")).to_have_text("three")

    page.get_by_role("button", name="Stages").click()
    expect(page.locator("#stages tbody tr")).to_have_count(4)
    expect(page.get_by_role("row", name="generator")).to_contain_text("tokens/s")
    assert said == []


def chat(app: App, messages: list[object], **fields: object) -> str:
    answer = app.post("/v1/chat/completions", json={"messages": messages, **fields}).json()
    text: str = answer["choices"][0]["message"]["content"]
    return text
