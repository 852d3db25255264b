"""The pages at /docs and /redoc work without internet access."""

from __future__ import annotations

import re
from pathlib import Path

import httpx
import pytest

from support.browser import render
from support.server import App


@pytest.mark.parametrize("path", ["/docs", "/redoc"])
def test_the_page_shows_the_routes_without_internet(path: str, demo: App, tmp_path: Path) -> None:
    page = httpx.get(demo.url + path, timeout=30).text
    assert not re.findall(r'(?:src|href)="(?:https?:)?//', page)

    document = render(demo.url + path, tmp_path)
    for route in ("/v1/chat/completions", "/v1/generate", "/v1/caption"):
        assert route not in page
        assert route in document.replace("\u200b", "").replace("<wbr>", "")
