"""A picture and questions about it, as people ask them."""

from __future__ import annotations

import base64
import subprocess
import sys
from pathlib import Path

import pytest
from playwright.sync_api import FileChooser, Page, expect

from blip2_serve.model.source import DEMO_PICTURE
from tests.page.conftest import Site

pytestmark = pytest.mark.long

PICTURE = DEMO_PICTURE.read_bytes()
CAPTION = "a red square 0"

# Makes the event as a browser would, with the picture among its files.
HAND_OVER = """([kind, encoded]) => {
  const bytes = Uint8Array.from(atob(encoded), (letter) => letter.charCodeAt(0));
  const data = new DataTransfer();
  data.items.add(new File([bytes], "mine.png", { type: "image/png" }));
  const event = kind === "paste"
    ? new ClipboardEvent(kind, { clipboardData: data, bubbles: true, cancelable: true })
    : new DragEvent(kind, { dataTransfer: data, bubbles: true, cancelable: true });
  document.body.dispatchEvent(event);
}"""


def answers(page: Page) -> list[str]:
    return page.locator(".answer").all_inner_texts()


def ask(page: Page, question: str) -> None:
    page.get_by_label("Question about the picture").fill(question)
    page.keyboard.press("Enter")


def upload(page: Page, name: str = "mine.png", content: bytes = PICTURE) -> None:
    file = {"name": name, "mimeType": "image/png", "buffer": content}
    page.locator("#files").set_input_files(files=[file])


def captioned(page: Page) -> None:
    """Opens a picture, and waits for its caption."""
    upload(page)
    expect(page.locator(".answer")).to_have_text(CAPTION)


def test_an_example_is_captioned(page: Page, site: Site) -> None:
    page.get_by_role("button", name="Drawn: a red square").click()
    expect(page.locator(".answer")).to_have_text(CAPTION)
    assert site.backend.pictures == [PICTURE_OF_EXAMPLE]
    assert site.backend.prompts == [""]


PICTURE_OF_EXAMPLE = (DEMO_PICTURE.parents[1] / "page" / "examples" / "shapes-1.png").read_bytes()


@pytest.mark.parametrize("way", ["chosen", "pasted", "dropped"])
def test_a_picture_of_ones_own_is_captioned(page: Page, site: Site, way: str) -> None:
    if way == "chosen":
        with page.expect_file_chooser() as chooser:
            page.get_by_role("button", name="Choose pictures").click()
        file = {"name": "mine.png", "mimeType": "image/png", "buffer": PICTURE}
        chooser.value.set_files(files=[file])
    else:
        kind = "paste" if way == "pasted" else "drop"
        page.evaluate(HAND_OVER, [kind, base64.b64encode(PICTURE).decode()])
    expect(page.locator(".answer")).to_have_text(CAPTION)
    expect(page.locator("figcaption")).to_have_text("mine.png")
    assert site.backend.pictures == [PICTURE]
    # The model's limits stand beside the answer.
    expect(page.locator("#talk .limits")).to_contain_text("For research")


def test_words_appear_as_they_come(page: Page, site: Site) -> None:
    site.backend.gate.clear()
    upload(page)
    expect(page.locator(".answer")).to_have_text("a red square")
    expect(page.locator(".turn")).to_have_attribute("aria-busy", "true")
    site.backend.gate.set()
    expect(page.locator(".answer")).to_have_text(CAPTION)
    expect(page.locator(".turn")).to_have_attribute("aria-busy", "false")


def test_a_chat_of_three_questions_has_its_history(page: Page, site: Site) -> None:
    captioned(page)
    for number, question in enumerate(["what is it?", "where?", "why?"], 1):
        ask(page, question)
        expect(page.locator(".answer").last).to_have_text(f"a red square {number}")
    assert len(answers(page)) == 4
    assert site.backend.prompts[-1] == (
        "Question: what is it? Answer: a red square 1. Question: where? Answer: a red square 2. "
        "Question: why? Answer:"
    )


@pytest.mark.parametrize("how", ["button", "Escape"])
def test_an_answer_that_is_stopped_ends_in_the_server_too(page: Page, site: Site, how: str) -> None:
    site.backend.gate.clear()
    upload(page)
    expect(page.locator(".answer")).to_have_text("a red square")
    if how == "button":
        page.get_by_role("button", name="Stop", exact=True).click()
    else:
        page.keyboard.press("Escape")
    expect(page.get_by_role("button", name="Regenerate")).to_be_visible()
    page.wait_for_timeout(0)
    assert answers(page) == ["a red square"]
    while not site.backend.stream_closed.is_set():
        page.wait_for_timeout(10)


def test_a_question_can_be_edited_and_an_answer_be_made_again(page: Page, site: Site) -> None:
    captioned(page)
    ask(page, "what is it?")
    expect(page.locator(".answer").last).to_have_text("a red square 1")
    ask(page, "where?")
    expect(page.locator(".answer")).to_have_count(3)
    expect(page.locator(".answer").last).to_have_text("a red square 2")
    second = page.locator(".turn").nth(1)
    second.get_by_role("button", name="Edit").click()
    second.get_by_label("Question").fill("who?")
    page.get_by_role("button", name="Ask again").click()

    expect(page.locator(".answer").last).to_have_text("a red square 1")
    expect(page.locator(".question").last).to_have_text("who?")
    assert len(answers(page)) == 2  # later ones were about another answer
    assert site.backend.prompts[-1] == "Question: who? Answer:"

    page.get_by_role("button", name="Regenerate").last.click()
    expect(page.locator(".turn").last).to_have_attribute("aria-busy", "false")
    assert site.backend.prompts[-2:] == ["Question: who? Answer:"] * 2


def test_the_keyboard_is_enough(page: Page) -> None:
    choosers: list[FileChooser] = []
    page.on("filechooser", lambda chooser: choosers.append(chooser))
    while not choosers:  # on a busy machine, Chromium sometimes drops the first key
        page.keyboard.press("o")
        page.wait_for_timeout(200)
    file = {"name": "mine.png", "mimeType": "image/png", "buffer": PICTURE}
    choosers[0].set_files(files=[file])
    expect(page.get_by_label("Question about the picture")).to_be_focused()
    page.keyboard.type("what is it?")
    page.keyboard.press("Shift+Enter")
    page.keyboard.type("and where?")
    page.keyboard.press("Enter")
    expect(page.locator(".question").last).to_have_text("what is it?\nand where?")
    page.keyboard.press("Shift+Tab")
    page.keyboard.press("/")
    expect(page.get_by_label("Question about the picture")).to_be_focused()


def test_a_screen_reader_hears_the_whole_answer_once(page: Page) -> None:
    captioned(page)
    expect(page.get_by_role("status")).to_have_text(f"Caption: {CAPTION}")
    ask(page, "what is it?")
    expect(page.get_by_role("status")).to_have_text("Answer: a red square 1")


def test_the_alternatives_of_a_word_are_shown(page: Page) -> None:
    captioned(page)
    page.get_by_text("Words", exact=True).click()
    page.get_by_role("button", name="␣red, 61%").click()
    table = page.locator(".alternatives")
    expect(table.get_by_role("row")).to_have_count(3)
    expect(table).to_contain_text("␣a␣cat")
    expect(table.locator(".chosen")).to_contain_text("␣red")
    page.keyboard.press("ArrowRight")
    expect(table.locator(".chosen")).to_contain_text("␣square")


def test_beams_are_shown_while_they_search_and_kept(page: Page, site: Site) -> None:
    page.get_by_text("How to answer").click()
    page.get_by_label("Beam search").check()
    site.backend.gate.clear()
    upload(page)
    live = page.locator(".live li")
    expect(live).to_have_count(2)
    expect(live.first).to_contain_text("a red square")
    expect(live.last).to_contain_text("✓")
    site.backend.gate.set()
    expect(live).to_have_count(0)
    page.get_by_text("Beams", exact=True).last.click()
    expect(page.locator(".more .beams li").first).to_contain_text(CAPTION)
    assert site.backend.params[-1].num_beams == 5


def test_where_the_time_went_is_a_waterfall(page: Page) -> None:
    captioned(page)
    page.get_by_text("Time", exact=True).click()
    table = page.locator(".waterfall")
    expect(table.get_by_role("row")).to_have_count(6)
    for name in ("request", "decode image", "encode image", "queue", "first token", "tokens"):
        expect(table.get_by_role("rowheader", name=name, exact=True)).to_be_visible()
    expect(table).to_contain_text("ms in the server")


def test_a_replaced_replica_is_marked_where_it_happened(page: Page, site: Site) -> None:
    site.backend.loses_replica_after = 2
    upload(page)
    expect(page.locator(".answer")).to_have_text("a red⟲ square 0")
    expect(page.get_by_role("img", name="a replica was replaced here")).to_be_visible()


def test_settings_are_sent_and_remembered(page: Page, site: Site) -> None:
    page.get_by_text("How to answer").click()
    page.get_by_label("Sampling").check()
    expect(page.get_by_label("Beams", exact=False)).to_have_count(0)  # they do nothing there
    page.get_by_label("Temperature").fill("0.5")
    page.reload()
    captioned(page)
    assert site.backend.params[-1].temperature == 0.5
    page.get_by_text("How to answer").click()
    page.get_by_label("Preset").select_option("vqa")
    page.get_by_role("button", name="Regenerate").click()
    expect(page.locator(".turn")).to_have_attribute("aria-busy", "false")
    params = site.backend.params[-1]
    assert (params.num_beams, params.max_tokens, params.length_penalty) == (5, 10, 0)
    page.get_by_role("button", name="Back to defaults").click()
    page.get_by_role("button", name="Regenerate").click()
    expect(page.locator(".turn")).to_have_attribute("aria-busy", "false")
    assert site.backend.params[-1].is_greedy


def test_conversations_stay_in_the_browser(page: Page, site: Site) -> None:
    captioned(page)
    ask(page, "what is it?")
    expect(page.get_by_role("status")).to_have_text("Answer: a red square 1")
    page.reload()
    page.get_by_role("button", name="History").click()
    page.get_by_role("button", name="mine.png: what is it?", exact=True).click()
    expect(page.locator(".answer")).to_have_text([CAPTION, "a red square 1"])
    ask(page, "where?")
    expect(page.locator(".answer").last).to_have_text("a red square 2")
    assert site.backend.pictures[-1] == PICTURE
    page.get_by_role("button", name="Forget all").click()
    expect(page.locator("#session-list")).to_have_text("Nothing yet.")


@pytest.mark.parametrize("language", ["curl", "Python"])
def test_a_request_is_copied_as_code_that_runs(
    page: Page, site: Site, tmp_path: Path, language: str
) -> None:
    upload(page, "it's mine.png")
    expect(page.locator(".answer")).to_have_text(CAPTION)
    ask(page, 'what\'s "it"?')
    expect(page.locator(".answer").last).to_have_text("a red square 1")
    page.get_by_role("button", name=f"Copy as {language}").last.click()
    expect(page.get_by_role("button", name="Copied")).to_be_visible()
    code = page.evaluate("navigator.clipboard.readText()")
    (tmp_path / "it's mine.png").write_bytes(PICTURE)
    command = ["bash", "-c", code] if language == "curl" else [sys.executable, "-c", code]
    ran = subprocess.run(
        command, cwd=tmp_path, capture_output=True, text=True, timeout=120, check=False
    )

    assert "a red square" in ran.stdout, ran.stderr
    assert site.backend.pictures[-1] == PICTURE
    assert site.backend.prompts[-1] == site.backend.prompts[-2] == 'Question: what\'s "it"? Answer:'


def test_an_answer_is_copied(page: Page) -> None:
    captioned(page)
    page.get_by_role("button", name="Copy", exact=True).click()
    expect(page.get_by_role("button", name="Copied")).to_be_visible()
    assert page.evaluate("navigator.clipboard.readText()") == CAPTION


def test_the_stages_are_watched(page: Page, site: Site) -> None:
    page.get_by_role("button", name="Stages").click()
    row = page.get_by_role("row", name="preprocessor")
    expect(row.get_by_role("img", name="running")).to_have_count(2)
    expect(row.get_by_role("img", name="starting")).to_have_count(1)
    expect(row).to_contain_text("13 images/s")
    expect(row).to_contain_text("21 images/s")
    site.backend.is_ready = False
    expect(page.locator("#stages-note")).to_contain_text("not ready")
