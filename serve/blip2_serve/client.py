"""How the command line asks a server: its URL, proxies on the way, and unexpected answers."""

from __future__ import annotations

import ipaddress
from collections.abc import Callable
from typing import Any

import httpx

from blip2_serve.errors import StartupError

TIMEOUT_S = 600.0


def connect(url: str, *, on_this_machine: bool = False) -> httpx.Client:
    """A client of the server at `url`, with or without a slash at its end.

    Proxies that the environment names (`http_proxy`) are for other machines: a server on a loopback
    address, or `on_this_machine`, is asked directly.

    Raises:
        StartupError: it is not an http or https URL, or the proxy settings are wrong.
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
        return httpx.Client(base_url=parsed, timeout=TIMEOUT_S, trust_env=not direct)
    except (httpx.InvalidURL, ValueError) as error:
        raise StartupError(f"the environment's proxy settings cannot be used: {error}") from None


def is_loopback(url: str) -> bool:
    """Whether the URL's host is this machine's loopback interface."""
    try:
        host = httpx.URL(url).host.lower()
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except (httpx.InvalidURL, ValueError):
        return False


def post(server: httpx.Client, path: str, body: dict[str, Any], pick: Callable[[Any], str]) -> str:
    """Posts `body` and returns what `pick` finds in the server's JSON answer.

    Raises:
        StartupError: no server answers, it answers with an error, or it is another kind of server.
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
            f"{response.url} answered {response.status_code}, but not as blip2-serve does: is "
            "another server or a proxy at this address?"
        ) from None
    raise StartupError(message)
