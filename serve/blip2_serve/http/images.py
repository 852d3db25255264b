"""Reads image files from URLs, within limits. The preprocessor decodes them."""

from __future__ import annotations

import asyncio
import binascii
import contextlib
import hashlib

import pybase64

from blip2_serve.errors import InvalidImage, InvalidRequest, Overloaded
from blip2_serve.http.downloads import Downloader
from blip2_serve.ingress_config import ImageLimits

_DATA_PREFIX = "data:"


class ImageReader:
    """Reads the image files of all requests to one ingress replica."""

    def __init__(self, limits: ImageLimits, downloader: Downloader | None = None) -> None:
        self._limits = limits
        self._downloader = downloader or Downloader(limits)
        self._downloads = asyncio.Semaphore(limits.max_downloads)

    async def fetch(self, url: str, param: str) -> bytes:
        """The image file at a data URL or, if the server allows it, at another one.

        `param` names the request's field in errors.

        Raises:
            InvalidRequest: the URL is of a kind, or leads to a place, that is not allowed.
            InvalidImage: the URL is malformed, too slow or unreachable, or its data has no bytes
                or more than the limit.
            Overloaded: too many other images are being downloaded.
        """
        url = url.strip()
        self.check_url(url, param)
        if is_data_url(url):
            return self.check(_decode_data_url(url, param), param)
        return self.check(await self._download(url, param), param)

    def check_url(self, url: str, param: str) -> None:
        """Checks the kind of a URL without fetching it.

        Raises:
            InvalidRequest: as for `fetch`.
        """
        if is_data_url(url):
            return
        if not url.lstrip().lower().startswith(("https://", "http://")):
            raise InvalidRequest(
                'send the image as a data URL ("data:image/jpeg;base64,...") or an https URL', param
            )
        if not self._limits.allow_urls:
            raise InvalidRequest(
                "this server does not fetch image URLs; send a data URL "
                '("data:image/jpeg;base64,..."), or start the server with --allow-image-urls',
                param,
            )
        self._downloader.check(url.strip(), param)

    def check(self, data: bytes, param: str) -> bytes:
        """`data` itself, if it may be an image file.

        Raises:
            InvalidImage: it has no bytes, or more than the limit.
        """
        if not data:
            raise InvalidImage("the image is empty", param, "empty")
        limit = self._limits.max_bytes
        if len(data) > limit:
            raise InvalidImage(
                f"the image has {len(data):,} bytes; the limit is {limit:,}", param, "bytes"
            )
        return data

    async def _download(self, url: str, param: str) -> bytes:
        seconds, begun = self._limits.url_timeout_s, False
        try:
            async with asyncio.timeout(seconds), self._downloads:
                begun = True
                return await self._downloader.get(url, param)
        except TimeoutError:
            if not begun:
                raise Overloaded("too many images are being downloaded; try again later") from None
            raise InvalidImage(
                f"downloading the image took longer than {seconds:g} seconds", param, "fetch"
            ) from None


def is_data_url(url: str) -> bool:
    return url.lstrip()[: len(_DATA_PREFIX)].lower() == _DATA_PREFIX


def digest(data: bytes, preprocessing: int, owner: str = "") -> str:
    """The key of an image's features, by the image, the preprocessing's version and whose it is."""
    # CPUs have instructions for SHA-256, which make it twice as fast as BLAKE2.
    name = hashlib.sha256(preprocessing.to_bytes(8))
    name.update(hashlib.sha256(owner.encode()).digest())
    name.update(data)
    return name.hexdigest()


def _decode_data_url(url: str, param: str) -> bytes:
    header, comma, payload = url.partition(",")
    if not comma:  # an encoder of whole URLs has been at it
        header, comma, payload = _unquote(url, param).decode(errors="replace").partition(",")
    _, *parameters = header.split(";")
    if "base64" in (parameter.strip().lower() for parameter in parameters):
        return _decode_base64(payload, param)
    if comma and "%" in payload:
        return _unquote(payload, param)
    raise InvalidImage(
        'a data URL must have the form "data:<media type>;base64,<data>"', param, "url"
    )


def _decode_base64(payload: str, param: str) -> bytes:
    """Decodes base64 as browsers do, which miss neither padding nor line breaks; also URL-safe."""
    with contextlib.suppress(ValueError):  # includes binascii.Error
        return pybase64.b64decode(payload, validate=True)
    data = _unquote(payload, param).translate(_STANDARD_ALPHABET, b" \t\n\r\f")
    data = data.rstrip(b"=")
    try:
        return pybase64.b64decode(data + b"=" * (-len(data) % 4), validate=True)
    except ValueError:
        raise InvalidImage(
            "the data URL is not valid base64: characters are missing or of another alphabet",
            param,
            "base64",
        ) from None


_STANDARD_ALPHABET = bytes.maketrans(b"-_", b"+/")


def _unquote(text: str, param: str) -> bytes:
    """Decodes %XX."""
    try:
        data = text.encode("ascii")
    except UnicodeError:
        raise InvalidImage(
            "a data URL must be ASCII; encode its data as base64", param, "url"
        ) from None
    if b"%" not in data:
        return data
    # Quoted-printable has = for %. C decodes it; urllib would take seconds and gigabytes for the
    # longest body.
    decoded = binascii.a2b_qp(data.replace(b"=", b"=3D").replace(b"%", b"="))
    if len(decoded) != len(data) - 2 * data.count(b"%"):
        raise InvalidImage(
            "the data URL is not valid: a % must be followed by two hexadecimal digits",
            param,
            "url",
        )
    return decoded
