"""Debian's Chromium: renders pages, or is driven by Playwright. It reaches this machine only."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from playwright.sync_api import Browser, expect, sync_playwright

WITHIN_MS = 20_000  # on two busy cores
FLAGS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-background-networking",
    "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1",
    "--no-proxy-server",
]


def executable() -> str:
    """The browser's path; skips the test if there is none."""
    found = shutil.which("chromium") or shutil.which("chromium-browser")
    if found is None:
        pytest.skip("chromium is not installed (apt-get install chromium)")
    return found


@contextmanager
def running_browser() -> Iterator[Browser]:
    """A browser for tests that are not coroutines: no event loop runs in its thread meanwhile."""
    path = executable()
    expect.set_options(timeout=WITHIN_MS)
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=path, args=FLAGS)
        yield browser
        browser.close()


def render(url: str, folder: Path, *, width: int = 1000) -> str:
    """Returns a page's DOM after its scripts have run, without access to other hosts."""
    return subprocess.run(
        [
            executable(),
            "--headless",
            *FLAGS,
            f"--user-data-dir={folder / 'profile'}",
            f"--window-size={width},800",
            "--virtual-time-budget=10000",
            "--dump-dom",
            url,
        ],
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    ).stdout
