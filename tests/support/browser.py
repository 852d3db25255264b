"""Renders pages in a browser."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest


def render(url: str, folder: Path, *, width: int = 1000) -> str:
    """Returns a page's DOM after its scripts have run, without access to other hosts."""
    browser = shutil.which("chromium") or shutil.which("chromium-browser")
    if browser is None:
        pytest.skip("chromium is not installed (apt-get install chromium)")
    return subprocess.run(
        [
            browser,
            "--headless",
            "--no-sandbox",
            "--disable-gpu",
            "--disable-background-networking",
            "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1",
            "--no-proxy-server",
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
