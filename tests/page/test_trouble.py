"""What the page says when something goes wrong, each in words and with a way on."""

from __future__ import annotations

from pathlib import Path

import pytest
from playwright.sync_api import Page, expect

from blip2_serve.config import AppConfig
from blip2_serve.errors import InvalidImage, Overloaded, Unavailable
from blip2_serve.http.keys import hash_of
from blip2_serve.ingress_config import AccessConfig, IngressConfig
from tests.page.conftest import Site
from tests.page.test_conversation import CAPTION, PICTURE, ask, captioned, upload

pytestmark = pytest.mark.long

SECRET = "blip2-secret"


def test_what_is_no_image_is_said(page: Page, site: Site, allowed: list[str]) -> None:
    allowed.append("400 (Bad Request)")
    site.backend.failures[b"text"] = InvalidImage("this is not an image", kind="format")
    upload(page, "notes.png", b"text")
    expect(page.locator(".turn .notice")).to_have_text("This is not an image.")
    expect(page.get_by_role("img", name="notes.png")).to_have_text("no preview")
    expect(page.get_by_role("status")).to_have_text("This is not an image.")


class TestTooLarge:
    @pytest.fixture
    def config(self) -> AppConfig:
        return AppConfig(ingress=IngressConfig(max_body_bytes=1000))

    def test_a_picture_that_is_too_large_is_said(self, page: Page, allowed: list[str]) -> None:
        allowed.append("413")
        upload(page)
        expect(page.locator(".turn .notice")).to_contain_text("large")


def test_a_busy_server_is_asked_again_after_a_countdown(
    page: Page, site: Site, allowed: list[str]
) -> None:
    allowed.append("429 (Too Many Requests)")
    site.backend.generation_failure = Overloaded("the server is busy", retry_after_s=3)
    upload(page)
    for left in (3, 2, 1):
        expect(page.locator(".turn .notice")).to_contain_text(f"Trying again in {left} s")
    site.backend.generation_failure = None
    expect(page.locator(".answer")).to_have_text(CAPTION)
    expect(page.locator(".turn .notice")).to_be_hidden()


def test_the_countdown_can_be_stopped(page: Page, site: Site, allowed: list[str]) -> None:
    allowed.append("429 (Too Many Requests)")
    site.backend.generation_failure = Overloaded("the server is busy", retry_after_s=30)
    upload(page)
    expect(page.locator(".turn .notice")).to_contain_text("Trying again in")
    page.get_by_role("button", name="Stop").click()
    expect(page.get_by_role("button", name="Regenerate")).to_be_visible()
    asked = len(site.backend.prompts)
    site.backend.generation_failure = None
    page.get_by_role("button", name="Regenerate").click()
    expect(page.locator(".answer")).to_have_text(CAPTION)
    assert len(site.backend.prompts) == asked + 1


def test_an_answer_that_breaks_off_keeps_its_words(page: Page, site: Site) -> None:
    site.backend.stream_fails_after = 2
    site.backend.stream_failure = Unavailable("a replica was lost; try again")
    upload(page)
    expect(page.locator(".turn .notice")).to_have_text("A replica was lost; try again.")
    expect(page.locator(".answer")).to_have_text("a red")
    site.backend.stream_fails_after = None
    page.get_by_role("button", name="Regenerate").click()
    expect(page.locator(".answer")).to_have_text(CAPTION)


def test_a_server_that_is_gone_is_said(page: Page, allowed: list[str]) -> None:
    captioned(page)
    allowed.append("ERR_INTERNET_DISCONNECTED")
    page.context.set_offline(True)
    ask(page, "what is it?")
    expect(page.locator(".turn .notice").last).to_contain_text("The server cannot be reached")


def test_a_stream_that_is_cut_is_said(page: Page) -> None:
    chunk = '{"choices":[{"index":0,"delta":{"content":"a red"},"logprobs":null}]}'
    page.route(
        "**/v1/chat/completions",
        lambda route: route.fulfill(body=f"data: {chunk}\n\n", content_type="text/event-stream"),
    )
    upload(page)
    expect(page.locator(".turn .notice")).to_contain_text("cut off before its end")
    expect(page.locator(".answer")).to_have_text("a red")


def test_an_error_page_of_something_in_between_is_said(page: Page, allowed: list[str]) -> None:
    allowed.append("502")
    page.route(
        "**/v1/chat/completions", lambda route: route.fulfill(status=502, body="<h1>Bad gateway")
    )
    upload(page)
    expect(page.locator(".turn .notice")).to_have_text("The server answered 502.")


def test_what_the_model_says_is_never_markup(page: Page) -> None:
    evil = "<img src=x onerror=alert(1)><script>alert(2)</script>"
    chunk = f'{{"choices":[{{"index":0,"delta":{{"content":"{evil}"}},"logprobs":null}}]}}'
    page.route(
        "**/v1/chat/completions",
        lambda route: route.fulfill(
            body=f"data: {chunk}\n\ndata: [DONE]\n\n", content_type="text/event-stream"
        ),
    )
    upload(page, "<b>x</b>.png")
    expect(page.locator(".answer")).to_have_text(evil)
    expect(page.locator("figcaption")).to_have_text("<b>x</b>.png")
    assert page.locator(".answer img, .answer script, figcaption b").count() == 0


class TestKeys:
    @pytest.fixture
    def config(self, tmp_path: Path) -> AppConfig:
        file = tmp_path / "keys.yaml"
        file.write_text(f"- name: ann\n  sha256: {hash_of(SECRET)}\n")
        return AppConfig(ingress=IngressConfig(access=AccessConfig(keys_file=str(file))))

    @pytest.fixture
    def allowed(self) -> list[str]:
        return ["401 (Unauthorized)"]

    @staticmethod
    def give(page: Page, secret: str, *, keep: bool = False) -> None:
        page.get_by_label("Key", exact=True).fill(secret)
        page.get_by_label("Remember").set_checked(keep)
        page.get_by_role("button", name="Use").click()

    def test_the_key_is_asked_for_until_it_is_right(self, page: Page) -> None:
        self.give(page, "blip2-wrong")
        expect(page.get_by_role("dialog")).to_be_visible()
        self.give(page, SECRET)
        expect(page.locator("#model")).to_have_text("demo")
        captioned(page)
        page.reload()
        expect(page.locator("#model")).to_have_text("demo")

    @pytest.mark.parametrize("keep", [False, True])
    def test_the_key_is_remembered_on_request(self, page: Page, site: Site, keep: bool) -> None:
        self.give(page, SECRET, keep=keep)
        expect(page.locator("#model")).to_have_text("demo")
        other = page.context.new_page()
        other.goto(site.url)
        if keep:
            expect(other.locator("#model")).to_have_text("demo")
        else:
            expect(other.get_by_role("dialog")).to_be_visible()

    def test_without_the_key_a_question_leads_to_the_dialog(self, page: Page) -> None:
        page.get_by_role("button", name="Cancel").click()
        upload(page)
        expect(page.locator(".turn .notice")).to_contain_text("asks for an API key")
        page.get_by_role("button", name="Enter the key").click()
        self.give(page, SECRET)
        expect(page.locator(".answer")).to_have_text(CAPTION)


def test_the_picture_is_sent_as_it_is(page: Page, site: Site) -> None:
    upload(page, content=PICTURE + b"and more")
    expect(page.locator(".answer")).to_have_text(CAPTION)
    assert site.backend.pictures == [PICTURE + b"and more"]
