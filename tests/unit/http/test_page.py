"""The files of the page: what is sent, and what a browser may make of it."""

from __future__ import annotations

import re

import httpx
import pytest

from blip2_serve.http.page import FOLDER
from support.fake_backend import error_of

FILES = [file for file in FOLDER.iterdir() if file.is_file()]


@pytest.fixture
async def policy(client: httpx.AsyncClient) -> dict[str, str]:
    """The page's Content-Security-Policy, by directive."""
    text = (await client.get("/")).headers["content-security-policy"]
    directives = (part.strip().partition(" ") for part in text.split(";"))
    return {name: value for name, _, value in directives}


def test_the_policy_allows_only_what_this_server_sends(policy: dict[str, str]) -> None:
    assert policy["default-src"] == "'none'"
    assert policy["require-trusted-types-for"] == "'script'"
    assert policy["frame-ancestors"] == policy["base-uri"] == policy["form-action"] == "'none'"
    for name in ("script-src", "style-src", "connect-src"):
        assert policy[name] == "'self'", name
    assert not any("unsafe" in value or "http" in value for value in policy.values())


async def test_the_page_has_nothing_that_its_policy_forbids(client: httpx.AsyncClient) -> None:
    text = (await client.get("/")).text
    assert not re.search(r"\son\w+=|\sstyle=|<style|<script(?![^>]*\ssrc=)|javascript:", text)


async def test_every_file_has_its_type_and_may_be_asked_for_again(
    client: httpx.AsyncClient,
) -> None:
    types = {".js": "text/javascript", ".css": "text/css", ".svg": "image/svg+xml"}
    for file in FILES:
        answer = await client.get(f"/page/{file.name}")
        assert answer.status_code == 200
        assert answer.content == file.read_bytes()
        if file.suffix in types:
            assert answer.headers["content-type"].startswith(types[file.suffix])
        assert answer.headers["x-content-type-options"] == "nosniff"
        again = await client.get(
            f"/page/{file.name}", headers={"if-none-match": answer.headers["etag"]}
        )
        assert again.status_code == 304


async def test_a_file_that_is_not_there_is_an_ordinary_404(client: httpx.AsyncClient) -> None:
    answer = await client.get("/page/nothing.js")
    assert answer.status_code == 404
    assert error_of(answer)["type"] == "invalid_request_error"


def test_the_page_is_small_and_complete() -> None:
    assert sum(file.stat().st_size for file in FILES) <= 100_000
    names = {file.name for file in FILES}
    for file in FILES:
        text = file.read_text(encoding="utf-8")
        assert not re.search(r"https?://(?!www\.w3\.org/2000/svg)", text), file.name
        assert {*re.findall(r'from "\./([^"]+)"', text)} <= names, file.name
        for path in re.findall(r'(?:src|href)="page/([^"]+)"', text):
            assert (FOLDER / path).is_file(), path
