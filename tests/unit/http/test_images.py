"""Image URLs to bytes."""

from __future__ import annotations

import base64
from collections.abc import Callable

import httpx
import pytest

from blip2_serve.config import ImageLimits
from blip2_serve.errors import InvalidImage, InvalidRequest
from blip2_serve.http import images

DATA = bytes(range(256))
ENCODED = base64.b64encode(DATA).decode()
OPEN = ImageLimits(allow_urls=True, max_bytes=1000)


@pytest.mark.parametrize(
    "url",
    [
        pytest.param(f"data:image/png;base64,{ENCODED}", id="as browsers write it"),
        pytest.param(f"data:;base64,{ENCODED}", id="without a media type"),
        pytest.param(f"DATA:IMAGE/PNG;BASE64,{ENCODED}", id="in capitals"),
        pytest.param(f"data:image/png;name=a.png;base64,{ENCODED}", id="with a parameter"),
        pytest.param(
            "data:image/png;base64," + base64.encodebytes(DATA).decode(), id="in several lines"
        ),
    ],
)
async def test_a_data_url_gives_its_bytes(url: str) -> None:
    assert await images.fetch(url, ImageLimits(), "image") == DATA


@pytest.mark.parametrize(
    "url",
    [
        pytest.param("data:image/png;base64,a", id="cut off"),
        pytest.param("data:image/png;base64,a-_b", id="in the alphabet for URLs"),
        pytest.param("data:image/png;base64,äöü=", id="not ASCII"),
        pytest.param(f"data:image/png,{ENCODED}", id="without base64"),
        pytest.param("data:image/png;base64", id="without data"),
        pytest.param("data:image/png;base64,", id="empty"),
        pytest.param("data:image/png;base64, \n", id="blank"),
    ],
)
async def test_a_broken_data_url_is_an_invalid_image(url: str) -> None:
    with pytest.raises(InvalidImage) as caught:
        await images.fetch(url, ImageLimits(), "messages")

    assert caught.value.param == "messages"


async def test_an_image_may_have_as_many_bytes_as_the_limit_says_and_no_more() -> None:
    url = f"data:image/png;base64,{ENCODED}"

    assert await images.fetch(url, ImageLimits(max_bytes=len(DATA)), "image") == DATA
    with pytest.raises(InvalidImage, match="256 bytes; at most 255"):
        await images.fetch(url, ImageLimits(max_bytes=len(DATA) - 1), "image")


@pytest.mark.parametrize("data", [pytest.param(b"", id="empty"), pytest.param(b"xx", id="large")])
def test_an_upload_is_held_to_the_same_limits(data: bytes) -> None:
    with pytest.raises(InvalidImage):
        images.check_upload(data, ImageLimits(max_bytes=1), "image")


@pytest.mark.parametrize("url", ["http://example.com/a.png", "file:///etc/passwd", "/a.png", ""])
async def test_other_addresses_are_refused_even_where_https_is_allowed(url: str) -> None:
    with pytest.raises(InvalidRequest):
        await images.fetch(url, OPEN, "image")


Answer = Callable[[httpx.Request], httpx.Response]


@pytest.fixture
def answer_with(monkeypatch: pytest.MonkeyPatch) -> Callable[[Answer], None]:
    """Puts a function in the place of the network."""

    def replace(answer: Answer) -> None:
        original = httpx.AsyncClient.__init__

        def offline(self: httpx.AsyncClient, **options: object) -> None:
            original(self, **{**options, "transport": httpx.MockTransport(answer)})  # type: ignore[arg-type]

        monkeypatch.setattr(httpx.AsyncClient, "__init__", offline)

    return replace


async def test_an_https_url_is_fetched_where_allowed(
    answer_with: Callable[[Answer], None],
) -> None:
    answer_with(lambda request: httpx.Response(200, content=str(request.url).encode()))

    url = "https://example.com/a.png"
    assert await images.fetch(url, OPEN, "image") == url.encode()


def fails(error: Exception) -> Answer:
    def raise_it(_: httpx.Request) -> httpx.Response:
        raise error

    return raise_it


@pytest.mark.parametrize(
    "answer",
    [
        pytest.param(lambda _: httpx.Response(404), id="not found"),
        pytest.param(lambda _: httpx.Response(200), id="empty"),
        pytest.param(lambda _: httpx.Response(200, content=b"x" * 1001), id="too large"),
        pytest.param(
            lambda _: httpx.Response(302, headers={"location": "http://169.254.169.254/"}),
            id="a redirect, which could lead into the own network",
        ),
        pytest.param(fails(httpx.ConnectError("no route")), id="unreachable"),
        pytest.param(fails(httpx.ReadTimeout("slow")), id="too slow"),
    ],
)
async def test_a_url_that_yields_no_image_is_an_invalid_image(
    answer_with: Callable[[Answer], None], answer: Answer
) -> None:
    answer_with(answer)

    with pytest.raises(InvalidImage) as caught:
        await images.fetch("https://example.com/a.png", OPEN, "image")
    assert caught.value.param == "image"


@pytest.mark.parametrize("url", ["https://", "https://[", "https://a b/", "https://a:99999/"])
async def test_a_malformed_https_url_is_the_clients_error(url: str) -> None:
    with pytest.raises(InvalidRequest):
        await images.fetch(url, OPEN, "image")


def test_the_digest_stands_for_bytes_and_preprocessing() -> None:
    assert images.digest(DATA, 1) == images.digest(bytes(DATA), 1)
    assert images.digest(DATA, 1) != images.digest(DATA[1:], 1)
    assert images.digest(DATA, 1) != images.digest(DATA, 2)
