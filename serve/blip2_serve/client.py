"""How the command line asks a server: its URL, the proxies on the way, and answers that are odd."""

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
        StartupError: it is no http or https URL.
    """
    direct = on_this_machine or is_loopback(url)
    try:
        parsed = httpx.URL(url.rstrip("/"))
        if parsed.scheme not in ("http", "https") or not parsed.host:
            raise httpx.InvalidURL("no http:// or https:// URL")
        return httpx.Client(base_url=parsed, timeout=TIMEOUT_S, trust_env=not direct)
    except (httpx.InvalidURL, ValueError) as error:
        raise StartupError(
            f"{url!r} is no server's URL ({error}): give one such as http://127.0.0.1:8000"
        ) from None


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
            f"{response.url} answers {response.status_code} and not in the form of blip2-serve: "
            "is another server there, or a proxy?"
        ) from None
    raise StartupError(message)
