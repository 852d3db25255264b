"""Downloads images from addresses that clients name, but none from the server's own network.

A host's name is resolved here, at each connection; every address found must be public, and one of
those checked is connected to. So a name cannot mean one address when it is checked and another one
afterwards. Nothing comes from the environment: no proxy, cookie or credential.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import socket
import ssl
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Sequence
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network, ip_address
from typing import Any

import httpcore
import httpx

from blip2_serve import __version__
from blip2_serve.errors import InvalidImage, InvalidRequest
from blip2_serve.ingress_config import ImageLimits

MAX_REDIRECTS = 3
USER_AGENT = f"blip2-serve/{__version__} (fetches images that its clients name)"
PORTS = {"https": 443, "http": 80}
LARGEST_PORT = 65_535
CONNECT_WITHIN_S = 3.0  # to one address; then the next one is tried

# What servers send images as, besides image/*.
OTHER_TYPES = ("application/octet-stream", "binary/octet-stream")

# The services of clouds that give credentials to any machine that asks, at public addresses.
METADATA = (IPv4Address("168.63.129.16"),)

NAT64 = IPv6Network("64:ff9b::/96")  # how networks without IPv4 reach its addresses

# What `is_global` misses, of which some stands for an IPv4 address that a gateway would connect to.
NOT_PUBLIC = (
    IPv4Network("192.0.0.0/24"),  # protocol assignments, metadata of a cloud among them
    IPv4Network("192.88.99.0/24"),  # relays of 6to4
    IPv6Network("::/96"),  # IPv4-compatible
    IPv6Network("::ffff:0:0/96"),  # IPv4-mapped
    IPv6Network("64:ff9b:1::/48"),  # local NAT64
    IPv6Network("2001::/23"),  # protocol assignments, Teredo among them
    IPv6Network("2002::/16"),  # 6to4
    IPv6Network("3fff::/20"),  # documentation
    IPv6Network("5f00::/16"),  # segment routing
    IPv6Network("fec0::/10"),  # site-local
)

Address = IPv4Address | IPv6Address

# (host, port) -> addresses
Resolve = Callable[[str, int], Awaitable[Sequence[str]]]


def is_public(address: Address) -> bool:
    """Whether anybody on the internet can reach this address, so that nothing is revealed by it."""
    if address in NAT64:
        return is_public(IPv4Address(int(address) & 0xFFFFFFFF))
    if address in METADATA or any(address in network for network in NOT_PUBLIC):
        return False
    reserved = address.is_multicast or address.is_reserved or address.is_unspecified
    return address.is_global and not reserved


async def resolve(host: str, port: int) -> Sequence[str]:
    """The addresses of a host, by the system's resolver."""
    loop = asyncio.get_running_loop()
    found = await loop.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    return [str(address[0]) for *_, address in found]


class NotPublic(Exception):
    """A host's name leads to an address that is not public."""


class PublicNetwork(httpcore.AsyncNetworkBackend):
    """Connects to hosts of which all addresses are public."""

    def __init__(
        self,
        resolve: Resolve = resolve,
        allow: Callable[[Address], bool] = is_public,
        inner: httpcore.AsyncNetworkBackend | None = None,
    ) -> None:
        self._resolve = resolve
        self._allow = allow
        self._inner = inner or httpcore.AnyIOBackend()

    async def connect_tcp(
        self,
        host: str,
        port: int,
        timeout: float | None = None,
        local_address: str | None = None,
        socket_options: Iterable[Any] | None = None,
    ) -> httpcore.AsyncNetworkStream:
        """
        Raises:
            NotPublic: one of the host's addresses is not.
            httpcore.ConnectError: the host is not known, or does not listen.
        """
        try:
            addresses = await self._resolve(host, port)
        except (OSError, UnicodeError) as error:
            raise httpcore.ConnectError(str(error)) from error
        # A scope ("%eth0") is part of link-local addresses only.
        if any("%" in a or not self._allow(ip_address(a)) for a in addresses):
            raise NotPublic
        failure: Exception = httpcore.ConnectError("no address")
        for address in dict.fromkeys(addresses):
            try:
                return await self._inner.connect_tcp(
                    address, port, timeout, local_address, socket_options
                )
            except (httpcore.ConnectError, httpcore.ConnectTimeout) as error:
                failure = error
        raise failure

    async def sleep(self, seconds: float) -> None:
        await self._inner.sleep(seconds)


class Downloader:
    """Downloads images within limits of where from, how many bytes and which kind.

    It does not limit the time.
    """

    def __init__(
        self,
        limits: ImageLimits,
        network: httpcore.AsyncNetworkBackend | None = None,
        trusted: ssl.SSLContext | None = None,
    ) -> None:
        self._limits = limits
        self._network = network or PublicNetwork()
        self._trusted = trusted

    def check(self, url: str, param: str) -> httpx.URL:
        """The URL as it will be connected to, if it may be.

        Raises:
            InvalidRequest: it is of another kind, or its host is not allowed.
            InvalidImage: it is malformed.
        """
        if "\\" in url:  # browsers take it for a slash, others for a part of the host
            raise InvalidImage("the image URL is not valid: it has a backslash", param, "url")
        try:
            parsed = httpx.URL(url)
            host = parsed.host.lower().rstrip(".")
        except (httpx.InvalidURL, UnicodeError):
            raise InvalidImage("the image URL is not valid", param, "url") from None
        if (parsed.port or 0) > LARGEST_PORT:
            raise InvalidImage("the image URL is not valid", param, "url")
        schemes = ("https", "http") if self._limits.allow_http else ("https",)
        if parsed.scheme not in schemes or not host:
            raise InvalidRequest(f"an image URL must begin with {schemes[0]}://", param)
        if parsed.userinfo:
            raise InvalidRequest("an image URL must not have a user or a password", param)
        allowed, denied = self._limits.allowed_hosts, self._limits.denied_hosts
        if _matches(host, denied) or (allowed and not _matches(host, allowed)):
            raise InvalidRequest(f"this server fetches no images from {host}", param)
        return parsed

    async def get(self, url: str, param: str) -> bytes:
        """The image file at a URL.

        Raises:
            InvalidRequest: as `check`; also for where it redirects to.
            InvalidImage: it cannot be fetched, is no image, or has too many bytes.
        """
        place = self.check(url, param)
        try:
            for _ in range(1 + MAX_REDIRECTS):
                async with self._requested(place) as response:
                    headers = httpx.Headers(response.headers)
                    location = headers.get("location")
                    if not (300 <= response.status < 400 and location):
                        return await self._read(response, headers, param)
                    place = self.check(str(place.join(location)), param)
        except httpx.InvalidURL:
            raise InvalidImage("the image URL redirects to none", param, "fetch") from None
        except NotPublic:
            raise InvalidRequest(
                "the image URL leads to an address that is not public; send a data URL", param
            ) from None
        except (httpcore.NetworkError, httpcore.ProtocolError, httpcore.TimeoutException):
            raise InvalidImage(
                "the image cannot be downloaded: its server cannot be reached or broke off",
                param,
                "fetch",
            ) from None
        raise InvalidImage(
            f"the image URL redirects more than {MAX_REDIRECTS} times", param, "fetch"
        )

    @contextlib.asynccontextmanager
    async def _requested(self, url: httpx.URL) -> AsyncIterator[httpcore.Response]:
        target = httpcore.URL(
            scheme=url.raw_scheme,
            host=url.raw_host,
            port=url.port or PORTS[url.scheme],
            target=url.raw_path,
        )
        headers: dict[bytes | str, bytes | str] = {
            "host": url.netloc,
            "user-agent": USER_AGENT,
            "accept": "image/*",
            "accept-encoding": "identity",  # a small body must not become a large one
            "connection": "close",
        }
        limits = {"timeout": {"connect": CONNECT_WITHIN_S}}
        async with (
            httpcore.AsyncConnectionPool(
                ssl_context=self._trusted or _usual_authorities(), network_backend=self._network
            ) as pool,
            pool.stream("GET", target, headers=headers, extensions=limits) as response,
        ):
            yield response

    async def _read(self, response: httpcore.Response, headers: httpx.Headers, param: str) -> bytes:
        if response.status != httpx.codes.OK:
            raise InvalidImage(
                f"the image URL answered with status {response.status}", param, "fetch"
            )
        kind = headers.get("content-type", OTHER_TYPES[0]).partition(";")[0].strip().lower()
        if not (kind.startswith("image/") or kind in OTHER_TYPES):
            raise InvalidImage(
                "what the image URL leads to is no image, by its content-type", param, "fetch"
            )
        if headers.get("content-encoding", "identity").lower() != "identity":
            raise InvalidImage(
                "the image's server compresses it, although it was asked not to", param, "fetch"
            )
        data = bytearray()
        async for piece in response.aiter_stream():
            data += piece
            if len(data) > self._limits.max_bytes:
                raise InvalidImage(
                    f"the image has more than {self._limits.max_bytes:,} bytes", param, "bytes"
                )
        return bytes(data)


def _matches(host: str, patterns: Iterable[str]) -> bool:
    """Whether a host is one of these, or below one that begins with "*."."""
    return any(
        host == pattern or (pattern.startswith("*.") and host.endswith(pattern[1:]))
        for pattern in patterns
    )


@functools.cache
def _usual_authorities() -> ssl.SSLContext:
    return httpx.create_ssl_context()
