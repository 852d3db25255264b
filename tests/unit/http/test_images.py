"""Reading image files from URLs, within limits."""

from __future__ import annotations

import asyncio
import base64
from urllib.parse import quote

import pytest

from blip2_serve.errors import InvalidImage, InvalidRequest, Overloaded
from blip2_serve.http.downloads import Downloader
from blip2_serve.http.images import ImageReader, digest
from blip2_serve.ingress_config import ImageLimits

DATA = bytes(range(256))
ENCODED = base64.b64encode(DATA).decode()
OPEN = ImageLimits(allow_urls=True, max_bytes=1000)


@pytest.mark.parametrize(
    "url",
    [
        pytest.param(f"data:image/png;base64,{ENCODED}", id="usual form"),
        pytest.param(f"data:;base64,{ENCODED}", id="without a media type"),
        pytest.param(f"DATA:IMAGE/PNG;BASE64,{ENCODED}", id="upper case"),
        pytest.param(f"data:image/png;name=a.png;base64,{ENCODED}", id="with a parameter"),
        pytest.param(
            "data:image/png;base64," + base64.encodebytes(DATA).decode(), id="wrapped lines"
        ),
        pytest.param(f"data:image/png;base64,{ENCODED.rstrip('=')}", id="without padding"),
        pytest.param(
            f"data:image/png;base64,{base64.urlsafe_b64encode(DATA).decode()}",
            id="URL-safe alphabet",
        ),
        pytest.param(
            f"data:image/png;base64,{base64.urlsafe_b64encode(DATA).decode().rstrip('=')}",
            id="URL-safe alphabet without padding",
        ),
        pytest.param(f"data:image/png;base64,{quote(ENCODED, safe='')}", id="escapes"),
        pytest.param(
            f"data:image/png;base64,{ENCODED.replace('+', '%2b').replace('=', '%3d')}",
            id="escapes in lower case",
        ),
        pytest.param(
            f"data:image/png;base64,{ENCODED[:9]}%0A{ENCODED[9:99]}%20{ENCODED[99:]}",
            id="escaped blanks",
        ),
        pytest.param(f"data:image/png;base64, {ENCODED[:9]} \t{ENCODED[9:]}\r\n", id="blanks"),
        pytest.param(f" \ndata:image/png;base64,{ENCODED}\n", id="blanks around the URL"),
        pytest.param(f"data:image/png; base64,{ENCODED}", id="a blank before base64"),
        pytest.param(f"data:image/png;charset=utf-8;base64,{ENCODED}", id="with a charset"),
        pytest.param(f"data:image/png;base64;name=a.png,{ENCODED}", id="base64 not last"),
        pytest.param(quote(f"data:image/png;base64,{ENCODED}", safe=":/"), id="escaped as a whole"),
        pytest.param(f"data:image/png,{quote(DATA)}", id="escaped bytes without base64"),
        pytest.param(f"data:,{quote(DATA)}", id="escaped bytes without a media type"),
    ],
)
async def test_a_data_url_is_decoded(url: str) -> None:
    assert await ImageReader(ImageLimits()).fetch(url, "image") == DATA


@pytest.mark.parametrize(
    "url",
    [
        pytest.param("data:image/png;base64,a", id="truncated"),
        pytest.param("data:image/png;base64,aGkxM", id="not a whole number of bytes"),
        pytest.param("data:image/png;base64,aG=k", id="padding inside"),
        pytest.param("data:image/png;base64,aG!k", id="another alphabet"),
        pytest.param("data:image/png;base64,b'aGk='", id="Python's notation of bytes"),
        pytest.param("data:image/png;base64,äöü=", id="not ASCII"),
        pytest.param("data:image/png;base64,aGk%", id="half an escape"),
        pytest.param("data:image/png;base64,aGk%zz", id="not an escape"),
        pytest.param("data:image/png,%89PNGä", id="escapes, and not ASCII"),
        pytest.param("data:image/png", id="only a header"),
        pytest.param(f"data:image/png,{ENCODED}", id="without base64"),
        pytest.param("data:image/png;base64", id="without data"),
        pytest.param("data:image/png;base64,", id="empty"),
        pytest.param("data:image/png;base64, \n", id="blank"),
    ],
)
async def test_a_malformed_data_url_is_an_invalid_image(url: str) -> None:
    with pytest.raises(InvalidImage) as caught:
        await ImageReader(ImageLimits()).fetch(url, "messages")

    assert caught.value.param == "messages"


async def test_an_image_may_have_exactly_the_limit_of_bytes() -> None:
    url = f"data:image/png;base64,{ENCODED}"

    assert await ImageReader(ImageLimits(max_bytes=len(DATA))).fetch(url, "image") == DATA
    with pytest.raises(InvalidImage, match="256 bytes; the limit is 255"):
        await ImageReader(ImageLimits(max_bytes=len(DATA) - 1)).fetch(url, "image")


@pytest.mark.parametrize("data", [pytest.param(b"", id="empty"), pytest.param(b"xx", id="large")])
def test_the_same_limits_apply_to_uploads(data: bytes) -> None:
    with pytest.raises(InvalidImage):
        ImageReader(ImageLimits(max_bytes=1)).check(data, "image")


@pytest.mark.parametrize("url", ["http://example.com/a.png", "file:///etc/passwd", "/a.png", ""])
async def test_other_urls_are_refused_even_if_https_is_allowed(url: str) -> None:
    with pytest.raises(InvalidRequest):
        await ImageReader(OPEN).fetch(url, "image")


class Slow(Downloader):
    """Downloads the URL's own text, each after some time; notes how many are under way."""

    def __init__(self, seconds: float) -> None:
        super().__init__(OPEN)
        self._seconds = seconds
        self.now = self.most = 0

    async def get(self, url: str, _: str) -> bytes:
        self.now += 1
        self.most = max(self.most, self.now)
        await asyncio.sleep(self._seconds)
        self.now -= 1
        return url.encode()


async def test_an_https_url_is_fetched_if_allowed() -> None:
    url = "https://example.com/a.png"

    assert await ImageReader(OPEN, Slow(0)).fetch(f" {url}\n", "image") == url.encode()
    with pytest.raises(InvalidRequest, match="does not fetch image URLs"):
        await ImageReader(ImageLimits(), Slow(0)).fetch(url, "image")


async def test_a_download_cannot_exceed_the_timeout() -> None:
    reader = ImageReader(OPEN.model_copy(update={"url_timeout_s": 0.2}), Slow(60))

    with pytest.raises(InvalidImage, match=r"longer than 0\.2 seconds"):
        async with asyncio.timeout(10):
            await reader.fetch("https://example.com/a.png", "image")


async def test_the_number_of_concurrent_downloads_is_limited() -> None:
    slow = Slow(0)
    reader = ImageReader(OPEN.model_copy(update={"max_downloads": 3}), slow)
    urls = [f"https://example.com/{number}.png" for number in range(20)]

    found = await asyncio.gather(*(reader.fetch(url, "image") for url in urls))
    assert found == [url.encode() for url in urls]
    assert slow.most == 3


async def test_the_timeout_of_a_download_that_never_starts_is_an_overload() -> None:
    reader = ImageReader(OPEN.model_copy(update={"url_timeout_s": 0.05, "max_downloads": 1}))
    await reader._downloads.acquire()  # like a download that takes long

    with pytest.raises(Overloaded):
        async with asyncio.timeout(10):
            await reader.fetch("https://example.com/a.png", "image")


@pytest.mark.parametrize("url", ["https://", "https://[", "https://a b/", "https://a:99999/"])
async def test_a_malformed_https_url_is_a_400(url: str) -> None:
    with pytest.raises(InvalidRequest):
        await ImageReader(OPEN).fetch(url, "image")


def test_the_digest_depends_on_bytes_and_preprocessing() -> None:
    assert digest(DATA, 1) == digest(bytes(DATA), 1)
    assert digest(DATA, 1) != digest(DATA[1:], 1)
    assert digest(DATA, 1) != digest(DATA, 2)


def test_each_owner_has_digests_of_its_own() -> None:
    assert digest(DATA, 1, "alice") == digest(DATA, 1, "alice")
    names = {digest(data, 1, owner) for data in (DATA, b"e" + DATA) for owner in ("", "a", "alice")}
    assert len(names) == 6
