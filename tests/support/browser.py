"""A page as a person's browser shows it."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest


def shown(url: str, folder: Path, *, width: int = 1000) -> str:
    """The page's document once its scripts have run; hosts other than this one are not found."""
    browser = shutil.which("chromium") or shutil.which("chromium-browser")
    if browser is None:
        pytest.skip("no chromium on this machine (apt-get install chromium): no page is looked at")
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
