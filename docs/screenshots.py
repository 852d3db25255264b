"""Takes the pictures of the page that the documents show.

    make serve                                    # in one terminal
    .venv/bin/python docs/screenshots.py          # in another

Needs the extra `test`, and Chromium as `chromium`.
"""

from __future__ import annotations

import io
import shutil
import sys
import tempfile
from pathlib import Path

from PIL import Image
from playwright.sync_api import Page, expect, sync_playwright

from blip2_serve.demo import scenes

PICTURES = Path(__file__).parent / "pictures"
URL = sys.argv[1] if len(sys.argv) > 1 else "http://127.0.0.1:8000"
QUESTION = "what is at the bottom left?"
GALLERY = range(6_100, 6_108)  # scenes
COLOURS = 64


def main() -> None:
    with sync_playwright() as playwright, tempfile.TemporaryDirectory() as folder:
        browser = playwright.chromium.launch(
            executable_path=shutil.which("chromium"), args=["--no-sandbox"]
        )
        for take in (conversation, gallery):
            page = browser.new_page(viewport={"width": 1000, "height": 900})
            page.goto(URL)
            take(page, Path(folder))
            keep(page.screenshot(), take.__name__)
        browser.close()


def conversation(page: Page, _: Path) -> None:
    page.get_by_text("How to answer").click()
    page.get_by_label("Beam search").check()
    page.get_by_text("How to answer").click()
    page.get_by_role("button", name="Drawn: a red square").click()
    expect(page.locator(".turn")).to_have_attribute("aria-busy", "false")
    page.get_by_label("Question about the picture").fill(QUESTION)
    page.keyboard.press("Enter")
    answered = page.locator(".turn").nth(1)
    expect(answered).to_have_attribute("aria-busy", "false")
    for title in ("Beams", "Time"):
        answered.get_by_text(title, exact=True).click()
    page.evaluate("scrollTo(0, 0)")


def gallery(page: Page, folder: Path) -> None:
    scenes_folder = folder / "scenes"
    scenes_folder.mkdir()
    for number, seed in enumerate(GALLERY, 1):
        scenes.sample(seed).image.save(scenes_folder / f"{number}.png")
    page.locator("#folder").set_input_files(scenes_folder)
    expect(page.locator("#progress")).to_have_text(f"{len(GALLERY)} of {len(GALLERY)}")


def keep(screenshot: bytes, name: str) -> None:
    """Few colours make a small file."""
    image = Image.open(io.BytesIO(screenshot)).convert("RGB").quantize(COLOURS)
    PICTURES.mkdir(exist_ok=True)
    image.save(PICTURES / f"{name}.png", optimize=True)


if __name__ == "__main__":
    main()
