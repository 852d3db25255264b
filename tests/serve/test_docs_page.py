"""The documentation at /docs and /redoc needs nothing from the internet."""

from __future__ import annotations

import re
from pathlib import Path

import httpx
import pytest

from support.browser import shown
from support.server import App


@pytest.mark.parametrize("path", ["/docs", "/redoc"])
def test_a_browser_without_internet_shows_the_routes(path: str, demo: App, tmp_path: Path) -> None:
    page = httpx.get(demo.url + path, timeout=30).text
    assert not re.findall(r'(?:src|href)="(?:https?:)?//', page)

    document = shown(demo.url + path, tmp_path)
    for route in ("/v1/chat/completions", "/v1/generate", "/v1/caption"):
        assert route not in page
        assert route in document.replace("\u200b", "").replace("<wbr>", "")
