"""The page on phones, for screen readers, in the dark; and whom it asks."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from axe_playwright_python.sync_playwright import Axe
from playwright.sync_api import Browser, Page, expect

from tests.page.conftest import Site
from tests.page.test_conversation import ask, captioned
from tests.page.test_gallery import choose

pytestmark = pytest.mark.long


def nothing(page: Page, _: Path) -> None:
    expect(page.get_by_role("heading", name="Ask about a picture")).to_be_visible()


def conversation(page: Page, _: Path) -> None:
    page.get_by_text("How to answer").click()
    page.get_by_label("Beam search").check()
    captioned(page)
    ask(page, "what is it?")
    expect(page.locator(".answer")).to_have_count(2)
    expect(page.get_by_role("status")).to_contain_text("Answer")
    for title in ("Words", "Beams", "Time"):
        page.locator(".turn").last.get_by_text(title, exact=True).click()
    page.get_by_role("button", name="History").click()
    page.get_by_role("button", name="Stages").click()
    expect(page.locator("#stages tbody tr")).to_have_count(4)
    expect(page.locator("#session-list li")).to_have_count(1)


def gallery(page: Page, folder: Path) -> None:
    choose(page, folder / "trip", [f"a picture with quite a long name {i}.png" for i in range(5)])
    expect(page.locator("#progress")).to_have_text("5 of 5")


def dialog(page: Page, _: Path) -> None:
    page.get_by_role("button", name="Key").click()
    expect(page.get_by_role("dialog")).to_be_visible()


STATES = pytest.mark.parametrize("state", [nothing, conversation, gallery, dialog])
State = Callable[[Page, Path], None]


@STATES
@pytest.mark.parametrize("colours", ["light", "dark"])
def test_axe_finds_no_violation(
    browser: Browser, site: Site, tmp_path: Path, state: State, colours: str
) -> None:
    # axe itself is a script that the page's policy would not allow.
    context = browser.new_context(bypass_csp=True, color_scheme=colours)  # type: ignore[arg-type]
    page = context.new_page()
    page.goto(site.url)
    state(page, tmp_path)
    page.screenshot(path=tmp_path / "page.png", full_page=True)
    results = Axe().run(page)
    context.close()
    assert results.response["passes"] or results.response["violations"] is not None
    assert results.violations_count == 0, results.generate_report()


@STATES
@pytest.mark.parametrize("width", [360, 768])
def test_a_phone_shows_it_without_scrolling_sideways(
    page: Page, tmp_path: Path, state: State, width: int
) -> None:
    page.set_viewport_size({"width": width, "height": 700})
    state(page, tmp_path)
    page.screenshot(path=tmp_path / "phone.png", full_page=True)
    assert page.evaluate("document.documentElement.scrollWidth") <= width


def test_nothing_but_this_server_is_asked(browser: Browser, site: Site) -> None:
    context = browser.new_context()
    page = context.new_page()
    asked: list[str] = []
    page.on("request", lambda request: asked.append(request.url))
    page.goto(site.url)
    captioned(page)
    context.close()
    assert all(url.startswith((site.url, f"blob:{site.url}")) for url in asked), asked
    assert len(asked) > 10
