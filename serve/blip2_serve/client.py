"""What the command line asks of a running server, over HTTP."""

from __future__ import annotations

import base64
import ipaddress
import json
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, TypeVar

import httpx

from blip2_serve.errors import StartupError

T = TypeVar("T")

TIMEOUT_S = 600.0
KEY_VARIABLE = "BLIP2_API_KEY"  # of the environment


def connect(url: str, *, on_this_machine: bool = False) -> httpx.Client:
    """Returns an HTTP client of the server at `url`; a slash at the end makes no difference.

    A server on a loopback address, or `on_this_machine`, is asked directly. Proxies that the
    environment names (`http_proxy`) are used for other machines only. The API key is that of the
    environment (`BLIP2_API_KEY`), if there is one.

    Raises:
        StartupError: `url` is not an http or https URL, or the proxy settings are wrong.
    """
    direct = on_this_machine or is_loopback(url)
    try:
        parsed = httpx.URL(url.rstrip("/"))
        if parsed.scheme not in ("http", "https") or not parsed.host:
            raise httpx.InvalidURL("it must start with http:// or https://")
    except (httpx.InvalidURL, ValueError) as error:
        raise StartupError(
            f"{url!r} is not a server URL ({error}): give one such as http://127.0.0.1:8000"
        ) from None
    try:
        return httpx.Client(
            base_url=parsed, headers=key_headers(), timeout=TIMEOUT_S, trust_env=not direct
        )
    except (httpx.InvalidURL, ValueError) as error:
        raise StartupError(
            f"the proxy settings in the environment are wrong ({error}): correct or unset "
            "http_proxy, https_proxy and all_proxy"
        ) from None


def key_headers() -> dict[str, str]:
    """The header with the environment's API key; none if it has no key."""
    key = os.environ.get(KEY_VARIABLE)
    return {"Authorization": f"Bearer {key}"} if key else {}


def is_loopback(url: str) -> bool:
    """Tells whether the URL's host is this machine's loopback interface."""
    try:
        host = httpx.URL(url).host.lower()
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except (httpx.InvalidURL, ValueError):
        return False


def caption(server: httpx.Client, image: bytes) -> str:
    """Asks for a caption of an image file. Raises StartupError as `post` does."""
    body = {"image": data_url(image)}
    return post(server, "/v1/caption", body, lambda answer: answer["data"][0]["caption"])


class Chat:
    """Questions about one image file, each with what was said before."""

    def __init__(self, server: httpx.Client, image: bytes) -> None:
        self._server = server
        self._image = {"type": "image_url", "image_url": {"url": data_url(image)}}
        self._messages: list[dict[str, Any]] = []

    def ask(self, question: str) -> Iterator[str]:
        """Yields the answer in pieces. Raises StartupError as `post` does, or if it breaks off."""
        text = {"type": "text", "text": question}
        content = [text] if self._messages else [self._image, text]
        self._messages.append({"role": "user", "content": content})
        answer = ""
        body = {"messages": self._messages, "stream": True}
        with _answering(self._server, "/v1/chat/completions", body) as response:
            for line in response.iter_lines():
                data = line.removeprefix("data: ")
                if data not in ("", "[DONE]"):
                    piece = _understood(response, partial(_piece, data))
                    answer += piece
                    yield piece
        self._messages.append({"role": "assistant", "content": answer})


def _piece(data: str) -> str:
    """The text of a chunk.

    Raises:
        StartupError: it is an error instead.
    """
    event = json.loads(data)
    if "error" in event:
        raise StartupError(str(event["error"]["message"]))
    return "".join(choice["delta"].get("content", "") for choice in event["choices"])


def data_url(file: bytes) -> str:
    """Returns a file as a data URL; the server goes by the bytes, not by the media type."""
    return f"data:application/octet-stream;base64,{base64.b64encode(file).decode()}"


def get(server: httpx.Client, path: str) -> Any:
    """The JSON answer. Raises StartupError as `post` does."""
    with _answering(server, path) as response:
        response.read()
        return _understood(response, response.json)


def post(server: httpx.Client, path: str, body: dict[str, Any], pick: Callable[[Any], str]) -> str:
    """Posts `body` as JSON and returns what `pick` finds in the JSON answer.

    Raises:
        StartupError: no server answers, the answer is an error, or it is not blip2-serve's.
    """
    with _answering(server, path, body) as response:
        response.read()
        return _understood(response, lambda: pick(response.json()))


@contextmanager
def _answering(
    server: httpx.Client, path: str, body: dict[str, Any] | None = None
) -> Iterator[httpx.Response]:
    """Posts `body` as JSON, or gets the path; yields a successful answer, to be read."""
    try:
        with server.stream("GET" if body is None else "POST", path, json=body) as response:
            if not response.is_success:
                response.read()
                raise StartupError(
                    _understood(response, lambda: str(response.json()["error"]["message"]))
                )
            yield response
    except httpx.RequestError as error:
        raise StartupError(
            f"no server answers at {server.base_url} ({error}): start one with blip2-serve up"
        ) from None


def _understood(response: httpx.Response, read: Callable[[], T]) -> T:
    """What `read` makes of the answer, if it is one of blip2-serve's."""
    try:
        return read()
    except (ValueError, LookupError, TypeError, AttributeError):
        raise StartupError(
            f"{response.url} answered with status {response.status_code}, but not as blip2-serve "
            "does: check whether the URL is that of another server or of a proxy"
        ) from None
