"""What the command line asks of a running server, over HTTP."""

from __future__ import annotations

import base64
import ipaddress
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx

from blip2_serve.errors import StartupError

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


def caption(server: httpx.Client, image: Path) -> str:
    """Asks for a caption of an image file. Raises StartupError as `post` does."""
    body = {"image": data_url(image)}
    return post(server, "/v1/caption", body, lambda answer: answer["data"][0]["caption"])


def ask(server: httpx.Client, image: Path, question: str) -> str:
    """Asks a question about an image file. Raises StartupError as `post` does."""
    content = [
        {"type": "image_url", "image_url": {"url": data_url(image)}},
        {"type": "text", "text": question},
    ]
    body = {"messages": [{"role": "user", "content": content}]}
    return post(
        server,
        "/v1/chat/completions",
        body,
        lambda answer: answer["choices"][0]["message"]["content"],
    )


def data_url(path: Path) -> str:
    """Returns a file as a data URL; the server goes by the bytes, not by the media type."""
    return f"data:application/octet-stream;base64,{base64.b64encode(path.read_bytes()).decode()}"


def post(server: httpx.Client, path: str, body: dict[str, Any], pick: Callable[[Any], str]) -> str:
    """Posts `body` as JSON and returns what `pick` finds in the JSON answer.

    Raises:
        StartupError: no server answers, the answer is an error, or it is not blip2-serve's.
    """
    try:
        response = server.post(path, json=body)
    except httpx.RequestError as error:
        raise StartupError(
            f"no server answers at {server.base_url} ({error}): start one with blip2-serve up"
        ) from None
    try:
        answer = response.json()
        if response.is_success:
            return pick(answer)
        message = str(answer["error"]["message"])
    except (ValueError, LookupError, TypeError):
        raise StartupError(
            f"{response.url} answered with status {response.status_code}, but not as blip2-serve "
            "does: check whether the URL is that of another server or of a proxy"
        ) from None
    raise StartupError(message)
