"""Many pictures at once: captions to edit, filter and save."""

from __future__ import annotations

import json
import zipfile
from pathlib import Path

import pytest
from playwright.sync_api import Page, expect

from blip2_serve.errors import InvalidImage, Overloaded
from blip2_serve.model.source import DEMO_PICTURE
from tests.page.conftest import Site

pytestmark = pytest.mark.long

PICTURE = DEMO_PICTURE.read_bytes()
CAPTION = "a red square"


def choose(page: Page, folder: Path, names: list[str]) -> None:
    """Chooses a folder with pictures of these names, each with bytes of its own."""
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(PICTURE + name.encode())
    with page.expect_file_chooser() as chooser:
        page.get_by_role("button", name="Choose a folder").click()
    chooser.value.set_files(folder)


def captions(page: Page) -> list[str]:
    return [box.input_value() for box in page.locator(".card textarea").all()]


def test_every_picture_of_a_folder_gets_a_caption(page: Page, site: Site, tmp_path: Path) -> None:
    names = ["b10.png", "b9.png", "inner/a.png"]
    choose(page, tmp_path / "trip", [*names, "notes.txt"])
    expect(page.locator("#progress")).to_have_text("3 of 3")
    assert captions(page) == [CAPTION] * 3
    # By name, as people count.
    expect(page.locator(".card .name")).to_have_text(
        ["trip/b9.png", "trip/b10.png", "trip/inner/a.png"]
    )
    assert sorted(site.backend.pictures) == sorted(PICTURE + name.encode() for name in names)
    expect(page.get_by_role("status")).to_have_text("3 captions are there.")
    expect(page.locator("#gallery .limits")).to_contain_text("For research")


def test_captions_are_edited_filtered_and_saved(page: Page, tmp_path: Path) -> None:
    choose(page, tmp_path / "trip", ["a.png", "a.jpg", "Zürich.png"])
    expect(page.locator("#progress")).to_have_text("3 of 3")
    page.get_by_label("Caption of trip/a.png").fill("mein „Hund“")
    page.get_by_label("Filter").fill("HUND a.png")
    expect(page.locator(".card:visible")).to_have_count(1)
    page.get_by_label("Filter").fill("")
    expect(page.locator(".card:visible")).to_have_count(3)

    with page.expect_download() as download:
        page.get_by_role("button", name="ZIP").click()
    download.value.save_as(tmp_path / "captions.zip")
    with zipfile.ZipFile(tmp_path / "captions.zip") as archive:
        assert archive.testzip() is None
        found = {name: archive.read(name).decode() for name in archive.namelist()}
    # Two pictures of one name have two files.
    assert found == {
        "trip/a.txt": f"{CAPTION}\n",
        "trip/a.png.txt": "mein „Hund“\n",
        "trip/Zürich.txt": f"{CAPTION}\n",
    }

    with page.expect_download() as download:
        page.get_by_role("button", name="JSONL").click()
    lines = download.value.path().read_text(encoding="utf-8").splitlines()
    assert [json.loads(line) for line in lines] == [
        {"file_name": "trip/a.jpg", "text": CAPTION},
        {"file_name": "trip/a.png", "text": "mein „Hund“"},
        {"file_name": "trip/Zürich.png", "text": CAPTION},
    ]


def test_a_bad_picture_fails_alone_and_can_be_tried_again(
    page: Page, site: Site, tmp_path: Path, allowed: list[str]
) -> None:
    allowed.append("400 (Bad Request)")
    bad = PICTURE + b"bad.png"
    site.backend.failures[bad] = InvalidImage("the image is cut off", kind="broken")
    choose(page, tmp_path / "trip", ["bad.png", "good.png"])
    expect(page.locator("#progress")).to_have_text("1 of 2, 1 failed")
    expect(page.locator(".card .notice").first).to_contain_text("The image is cut off.")
    del site.backend.failures[bad]
    page.get_by_role("button", name="Again").click()
    expect(page.locator("#progress")).to_have_text("2 of 2")


def test_a_busy_server_is_waited_for(
    page: Page, site: Site, tmp_path: Path, allowed: list[str]
) -> None:
    allowed.append("429 (Too Many Requests)")
    busy = PICTURE + b"a.png"
    site.backend.failures[busy] = Overloaded("the server is busy", retry_after_s=2)
    choose(page, tmp_path / "trip", ["a.png", "b.png"])
    expect(page.locator(".card .notice").first).to_contain_text("busy. Again in")
    del site.backend.failures[busy]
    expect(page.locator("#progress")).to_have_text("2 of 2")


def test_the_work_is_stopped_and_goes_on(page: Page, site: Site, tmp_path: Path) -> None:
    names = [f"{number}.png" for number in range(12)]
    site.backend.eyes.clear()
    choose(page, tmp_path / "trip", names)
    expect(page.locator(".card[data-state=working]")).to_have_count(4)
    page.get_by_role("button", name="Stop").click()
    expect(page.locator(".card[data-state=working]")).to_have_count(0)
    site.backend.eyes.set()
    page.get_by_role("button", name="Go on").click()
    expect(page.locator("#progress")).to_have_text("12 of 12")


def test_two_hundred_pictures_are_not_all_drawn_at_once(page: Page, tmp_path: Path) -> None:
    choose(page, tmp_path / "trip", [f"{number}.png" for number in range(200)])
    expect(page.locator("#progress")).to_have_text("200 of 200", timeout=120_000)
    expect(page.locator(".card")).to_have_count(200)
    skipped = page.evaluate(
        """() => [...document.querySelectorAll(".card textarea")]
                 .filter((text) => !text.checkVisibility({contentVisibilityAuto: true})).length"""
    )
    assert skipped > 100
    page.get_by_label("Filter").fill("/150.png")
    expect(page.locator(".card:visible")).to_have_count(1)


def test_a_picture_of_the_gallery_can_be_talked_about(page: Page, tmp_path: Path) -> None:
    choose(page, tmp_path / "trip", ["a.png", "b.png"])
    expect(page.locator("#progress")).to_have_text("2 of 2")
    page.get_by_role("button", name="Ask about trip/b.png").click()
    expect(page.locator("figcaption")).to_have_text("b.png")
    expect(page.locator(".answer")).to_have_text("a red square 0")
    page.get_by_role("button", name="Back to the gallery").click()
    expect(page.locator(".card")).to_have_count(2)
    page.get_by_role("button", name="Close").click()
    expect(page.get_by_role("heading", name="Ask about a picture")).to_be_visible()
