"""Images are fetched from where clients say, and never from the server's own network.

Attacks are named by the reports of those that other servers have suffered. Each is tried a second
time with the guard weakened, where it must succeed: so it is the guard that stops it.
"""

from __future__ import annotations

import gzip
import itertools
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from ipaddress import ip_address
from pathlib import Path
from typing import Any

import httpcore
import httpx
import pytest

from blip2_serve.config import AppConfig
from blip2_serve.errors import InvalidImage, InvalidRequest
from blip2_serve.http import downloads
from blip2_serve.http.downloads import Downloader, PublicNetwork, is_public
from blip2_serve.ingress_config import ImageLimits
from support.fake_backend import FakeBackend, client_of, error_of
from support.hostile_web import PUBLIC, Site, Web, image, redirect, serving

OPEN = ImageLimits(allow_urls=True, max_bytes=1000)
NAMES = ("good.example", "other.example", "*.cdn.example")
PICTURE = "https://good.example/a.png"

INTERNAL = [
    pytest.param("127.0.0.1", id="loopback, vLLM CVE-2025-6242"),
    pytest.param("127.8.9.10", id="loopback"),
    pytest.param("0.0.0.0", id="unspecified"),
    pytest.param("0.1.2.3", id="this network"),
    pytest.param("10.0.0.1", id="private, LMDeploy CVE-2026-33626"),
    pytest.param("172.16.5.4", id="private"),
    pytest.param("192.168.1.1", id="private"),
    pytest.param("169.254.169.254", id="metadata, LightRAG CVE-2026-85740"),
    pytest.param("169.254.170.2", id="metadata of containers"),
    pytest.param("100.100.100.200", id="metadata in carrier-grade NAT"),
    pytest.param("168.63.129.16", id="metadata at a public address"),
    pytest.param("192.0.0.192", id="metadata among protocol assignments"),
    pytest.param("100.64.0.1", id="carrier-grade NAT"),
    pytest.param("198.18.0.1", id="benchmarks"),
    pytest.param("224.0.0.1", id="multicast"),
    pytest.param("239.255.255.250", id="multicast of devices"),
    pytest.param("240.0.0.1", id="reserved"),
    pytest.param("255.255.255.255", id="broadcast"),
    pytest.param("::1", id="IPv6 loopback"),
    pytest.param("::", id="IPv6 unspecified"),
    pytest.param("fe80::1", id="IPv6 link-local"),
    pytest.param("fec0::1", id="IPv6 site-local"),
    pytest.param("fd00:ec2::254", id="IPv6 metadata"),
    pytest.param("ff02::1", id="IPv6 multicast"),
    pytest.param("2001:db8::1", id="IPv6 documentation"),
    pytest.param("::ffff:127.0.0.1", id="IPv4-mapped"),
    pytest.param("::ffff:93.184.216.34", id="IPv4-mapped, even if public"),
    pytest.param("::127.0.0.1", id="IPv4-compatible"),
    pytest.param("64:ff9b::10.0.0.1", id="NAT64"),
    pytest.param("64:ff9b:1::7f00:1", id="local NAT64"),
    pytest.param("2002:7f00:1::", id="6to4"),
    pytest.param("2001:0:4136:e378:8000:63bf:3fff:fdd2", id="Teredo"),
]

Serve = Callable[[Site], AbstractAsyncContextManager[tuple[Web, Any]]]


@pytest.fixture
def serve(tmp_path: Path) -> Serve:
    """Serves a site in a hostile web; yields that and whom its clients should trust."""
    return lambda site: serving(site, tmp_path, *NAMES)


def downloader(web: Web, trusted: Any, limits: ImageLimits = OPEN, **weak: Any) -> Downloader:
    return Downloader(limits, PublicNetwork(web.resolve, inner=web.network(), **weak), trusted)


def anywhere(_: object) -> bool:
    """Weakens the check of addresses."""
    return True


# -- what is meant to work -------------------------------------------------------------------------


async def test_an_image_is_fetched_by_name_from_the_address_of_the_name(serve: Serve) -> None:
    async with serve(lambda _: image(b"bytes")) as (web, trusted):
        web.names["good.example"] = [[PUBLIC]]

        assert await downloader(web, trusted).get(f"{PICTURE}?size=1#top", "image") == b"bytes"

    (asked,) = web.asked
    assert web.connected == [PUBLIC]
    assert (asked.path, asked.server_name) == ("/a.png?size=1", "good.example")
    assert asked.headers["host"] == "good.example"
    assert asked.headers["user-agent"].startswith("blip2-serve/")
    assert asked.headers.keys().isdisjoint({"cookie", "authorization", "referer"})


async def test_the_next_address_is_tried_if_one_does_not_answer(serve: Serve) -> None:
    class Broken(httpcore.AnyIOBackend):
        def __init__(self, web: Web) -> None:
            self._inner = web.network()

        async def connect_tcp(
            self, host: str, port: int, timeout: float | None = None, *args: Any, **more: Any
        ) -> Any:
            if host == "1.1.1.1":
                assert timeout == downloads.CONNECT_WITHIN_S
                raise httpcore.ConnectTimeout
            return await self._inner.connect_tcp(host, port, timeout, *args, **more)

    async with serve(lambda _: image()) as (web, trusted):
        web.names["good.example"] = [["1.1.1.1", PUBLIC]]
        network = PublicNetwork(web.resolve, inner=Broken(web))

        assert await Downloader(OPEN, network, trusted).get(PICTURE, "image") == b"picture"
    assert web.connected == [PUBLIC]


async def test_three_redirects_are_followed_and_no_fourth(serve: Serve) -> None:
    def site(path: str) -> Any:
        left = int(path[1:])
        return redirect(f"/{left - 1}", **{"Set-Cookie": "a=b"}) if left else image()

    async with serve(site) as (web, trusted):
        web.names["good.example"] = [[PUBLIC]]
        own = downloader(web, trusted)

        assert await own.get("https://good.example/3", "image") == b"picture"
        assert all("cookie" not in asked.headers for asked in web.asked)
        with pytest.raises(InvalidImage, match="redirects more than 3 times"):
            await own.get("https://good.example/4", "image")


@pytest.mark.parametrize("address", ["93.184.216.34", "2606:2800:220:1::1", "64:ff9b::5db8:d822"])
def test_public_addresses_are_allowed(address: str) -> None:
    assert is_public(ip_address(address))


# -- addresses -------------------------------------------------------------------------------------


@pytest.mark.parametrize("address", INTERNAL)
@pytest.mark.parametrize(
    "way",
    [
        "by name",
        "among public ones",
        "as a number",
        pytest.param("by redirect", id="by redirect, LMDeploy CVE-2026-63764"),
    ],
)
async def test_an_internal_address_is_not_connected_to(
    serve: Serve, address: str, way: str
) -> None:
    async with attack(serve, address, way) as (web, trusted, url):
        with pytest.raises(InvalidRequest, match="not public"):
            await downloader(web, trusted, with_http()).get(url, "image")
        assert address not in web.connected

        await downloader(web, trusted, with_http(), allow=anywhere).get(url, "image")
        assert address in web.connected


def with_http(**more: Any) -> ImageLimits:
    return OPEN.model_copy(update={"allow_http": True, **more})


@asynccontextmanager
async def attack(serve: Serve, address: str, way: str) -> AsyncIterator[tuple[Web, Any, str]]:
    """A web in which a URL leads to an address; without TLS, as numbers have no certificate."""
    leads = f"http://[{address}]/" if ":" in address else f"http://{address}/"
    async with serve(lambda path: redirect(leads) if path == "/away" else image()) as (web, tls):
        web.names |= {"bad.example": [[address]], "good.example": [[PUBLIC]]}
        if way == "among public ones":
            web.names["bad.example"] = [[address, PUBLIC]]
        urls = {"as a number": leads, "by redirect": "http://good.example/away"}
        yield web, tls, urls.get(way, "http://bad.example/")


class _Again(PublicNetwork):
    """Weak: it checks a name, and leaves it to the connection to look it up once more."""

    async def connect_tcp(self, host: str, port: int, *args: Any, **more: Any) -> Any:
        assert all(is_public(ip_address(a)) for a in await self._resolve(host, port))
        return await self._inner.connect_tcp(host, port, *args, **more)


@pytest.mark.parametrize("network", [PublicNetwork, _Again])
async def test_a_name_cannot_change_its_address_after_the_check(
    serve: Serve, network: type[PublicNetwork]
) -> None:
    async with serve(lambda _: image()) as (web, trusted):
        web.names["good.example"] = [[PUBLIC], ["127.0.0.1"]]
        own = Downloader(OPEN, network(web.resolve, inner=web.network()), trusted)

        assert await own.get(PICTURE, "image") == b"picture"
    assert web.connected == [PUBLIC if network is PublicNetwork else "127.0.0.1"]


@pytest.mark.parametrize("host", ["2130706433", "0x7f000001", "127.1", "0177.0.0.1", "localhost"])
async def test_loopback_in_other_words(host: str) -> None:
    """The system's resolver understands all of these."""
    network = PublicNetwork()

    with pytest.raises(downloads.NotPublic):
        await network.connect_tcp(host, 443)


# -- URLs ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "url",
    [
        pytest.param("https://good.example\\@bad.example/", id="vLLM CVE-2026-24779"),
        pytest.param("https://bad.example\\.good.example/", id="vLLM CVE-2026-25960"),
        pytest.param("https:\\\\bad.example/", id="backslashes for slashes"),
        pytest.param("https://user@good.example/", id="a user"),
        pytest.param("https://user:password@good.example/", id="a password"),
        pytest.param("https://:@good.example/", id="an empty password"),
        pytest.param("https://good.example%2f@bad.example/", id="an escaped slash in a user"),
        pytest.param("https://bad.example%00.good.example/", id="an escape in the host"),
        pytest.param("https://good.example:65536/", id="no port"),
        pytest.param("https://good.example:443:80/", id="two ports"),
        pytest.param("https://[fe80::1%25eth0]/", id="a scope"),
        pytest.param("https://ⓖood.example/", id="letters that become others"),
        pytest.param("http://good.example/", id="http"),
        pytest.param("ftp://good.example/", id="ftp"),
        pytest.param("file:///etc/passwd", id="file"),
        pytest.param("gopher://good.example/", id="gopher"),
    ],
)
@pytest.mark.parametrize("way", ["sent", "by redirect"])
async def test_a_url_that_is_not_plain_is_refused(serve: Serve, url: str, way: str) -> None:
    def site(path: str) -> Any:
        return redirect(url) if path == "/away" else image()

    sent = url if way == "sent" else "https://good.example/away"
    async with serve(site) as (web, trusted):
        web.names |= {"good.example": [[PUBLIC]], "bad.example": [["1.2.3.4"]]}
        with pytest.raises((InvalidRequest, InvalidImage)):
            await downloader(web, trusted).get(sent, "image")
    assert len(web.asked) == (way == "by redirect")


@pytest.mark.parametrize("url", ["https:///a.png", "https://good.example/\r\nX: y", "//"])
async def test_a_broken_url_is_refused(serve: Serve, url: str) -> None:
    async with serve(lambda _: image()) as (web, trusted):
        with pytest.raises((InvalidRequest, InvalidImage)):
            await downloader(web, trusted).get(url, "image")
    assert web.connected == []


@pytest.mark.parametrize(
    ("allowed", "denied", "url", "is_allowed"),
    [
        ((), (), "https://good.example/", True),
        (("good.example",), (), "https://good.example/", True),
        (("good.example",), (), "https://GOOD.example/", True),
        (("good.example",), (), "https://other.example/", False),
        (("good.example",), (), "https://good.example.other.example/", False),
        (("good.example",), (), "https://a.good.example/", False),
        (("*.cdn.example",), (), "https://a.cdn.example/", True),
        (("*.cdn.example",), (), "https://cdn.example/", False),
        (("*.cdn.example",), (), "https://evilcdn.example/", False),
        (("*.cdn.example",), ("b.cdn.example",), "https://b.cdn.example/", False),
        ((), ("good.example",), "https://good.example/", False),
        ((), ("*.example",), "https://good.example./", False),
        ((), ("good.example",), "https://other.example/", True),
        (("good.example",), (), "https://good.example/away", False),  # to other.example
    ],
)
async def test_hosts_can_be_allowed_and_denied(
    serve: Serve, allowed: tuple[str, ...], denied: tuple[str, ...], url: str, is_allowed: bool
) -> None:
    def site(path: str) -> Any:
        return redirect("https://other.example/") if path == "/away" else image()

    limits = ImageLimits.model_validate(
        {"allow_urls": True, "allowed_hosts": allowed, "denied_hosts": denied}
    )
    async with serve(site) as (web, trusted):
        names = [httpx.URL(url).host, httpx.URL(url).host.lower(), *NAMES]
        web.names |= {name: [[PUBLIC]] for name in names}
        if is_allowed:
            assert await downloader(web, trusted, limits).get(url, "image") == b"picture"
        else:
            with pytest.raises(InvalidRequest, match="fetches no images from"):
                await downloader(web, trusted, limits).get(url, "image")


async def test_http_can_be_allowed(serve: Serve) -> None:
    async with serve(lambda _: image()) as (web, trusted):
        web.names["good.example"] = [[PUBLIC]]
        own = downloader(web, trusted, with_http())

        assert await own.get("http://good.example/", "image") == b"picture"
    assert web.asked[0].server_name == ""


async def test_a_certificate_must_be_for_the_name(serve: Serve) -> None:
    async with serve(lambda _: image()) as (web, trusted):
        web.names["bad.example"] = [[PUBLIC]]

        with pytest.raises(InvalidImage, match="cannot be downloaded"):
            await downloader(web, trusted).get("https://bad.example/", "image")
    assert web.asked == []


# -- answers ---------------------------------------------------------------------------------------


def endless() -> Iterator[bytes]:
    return itertools.repeat(b"x" * 100)


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        pytest.param((200, {}, [b"x" * 1001]), "more than 1,000 bytes", id="too large"),
        pytest.param((200, {}, endless()), "more than 1,000 bytes", id="endless"),
        pytest.param(
            (200, {"Content-Length": "9" * 10}, endless()),
            "more than 1,000",
            id="long, and says so",
        ),
        pytest.param(
            (200, {"Content-Encoding": "gzip"}, [gzip.compress(bytes(10**6))]),
            "compresses it",
            id="a small body that becomes a large one",
        ),
        pytest.param(
            (200, {"Content-Type": "text/html"}, [b"<html>"]), "no image, by its", id="a page"
        ),
        pytest.param(
            (200, {"Content-Type": "application/json"}, [b"{}"]), "no image, by its", id="JSON"
        ),
        pytest.param((404, {}, []), "answered with status 404", id="not found"),
        pytest.param((304, {}, []), "answered with status 304", id="not modified"),
        pytest.param((302, {}, []), "answered with status 302", id="a redirect to nowhere"),
        pytest.param((200, {"X": "y" * 200_000}, []), "cannot be downloaded", id="a long header"),
        pytest.param(
            (200, {"Content-Length": "9"}, [b"x"]), "cannot be downloaded", id="a short body"
        ),
        pytest.param(("no number", {}, []), "cannot be downloaded", id="no HTTP"),
    ],
)
async def test_an_answer_that_is_no_image_within_the_limits(
    serve: Serve, answer: Any, message: str
) -> None:
    async with serve(lambda _: answer) as (web, trusted):
        web.names["good.example"] = [[PUBLIC]]

        with pytest.raises(InvalidImage, match=message) as caught:
            await downloader(web, trusted).get(PICTURE, "image")
    assert caught.value.param == "image"


@pytest.mark.parametrize("kind", ["IMAGE/JPEG; q=1", "application/octet-stream", None])
async def test_content_types_that_images_have(serve: Serve, kind: str | None) -> None:
    headers = {"Content-Type": kind} if kind else {}
    async with serve(lambda _: (200, headers, [b"x" * 1000])) as (web, trusted):
        web.names["good.example"] = [[PUBLIC]]

        assert len(await downloader(web, trusted).get(PICTURE, "image")) == 1000


async def test_nothing_of_the_environment_is_used(
    serve: Serve, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / ".netrc").write_text("machine good.example login me password secret")
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("NETRC", str(tmp_path / ".netrc"))
    async with serve(lambda _: image()) as (web, trusted):
        for kind in ("http_proxy", "https_proxy", "all_proxy"):
            monkeypatch.setenv(kind, "http://127.0.0.1:9")
        web.names["good.example"] = [[PUBLIC]]

        assert await downloader(web, trusted).get(PICTURE, "image") == b"picture"
    assert web.connected == [PUBLIC]
    assert "authorization" not in web.asked[0].headers


# -- routes ----------------------------------------------------------------------------------------

METADATA = "https://169.254.169.254/latest/meta-data/"


def bodies(url: str) -> dict[str, dict[str, Any]]:
    """A request to each route, about an image at this URL."""
    chat = [{"type": "image_url", "image_url": {"url": url}}]
    response = [{"type": "input_image", "image_url": url}]
    return {
        "/v1/generate": {"image": url},
        "/v1/caption": {"images": [url]},
        "/v1/completions": {"prompt": "a", "image": url},
        "/v1/chat/completions": {"messages": [{"role": "user", "content": chat}]},
        "/v1/responses": {"input": [{"role": "user", "content": response}]},
    }


@pytest.mark.parametrize("route", bodies(""))
async def test_every_route_has_the_guard(route: str) -> None:
    config = AppConfig.model_validate({"ingress": {"images": {"allow_urls": True}}})
    async with client_of(FakeBackend(), config) as client:
        response = await client.post(route, json=bodies(METADATA)[route])

    assert response.status_code == 400
    assert "not public" in error_of(response)["message"]


async def test_the_guard_is_there_for_forms_as_well() -> None:
    config = AppConfig.model_validate({"ingress": {"images": {"allow_urls": True}}})
    async with client_of(FakeBackend(), config) as client:
        response = await client.post("/v1/caption", files={"image": (None, METADATA)})

    assert response.status_code == 400
    assert "not public" in error_of(response)["message"]


async def test_urls_in_text_are_never_fetched(monkeypatch: pytest.MonkeyPatch) -> None:
    """TGI CVE-2026-0599: it fetched whatever looked like an image in Markdown."""
    fetched: list[str] = []

    async def get(_: Downloader, url: str, __: str) -> bytes:
        fetched.append(url)
        return b"picture"

    monkeypatch.setattr(Downloader, "get", get)
    config = AppConfig.model_validate({"ingress": {"images": {"allow_urls": True}}})
    text = f"![]({PICTURE}) <img src='{PICTURE}'> {PICTURE}"
    part = {"type": "image_url", "image_url": {"url": "https://sent.example/"}}
    content = [{"type": "text", "text": text}, part]
    async with client_of(FakeBackend(), config) as client:
        messages = [{"role": "user", "content": content}]
        response = await client.post("/v1/chat/completions", json={"messages": messages})

    assert response.status_code == 200
    assert fetched == ["https://sent.example/"]
