"""`blip2-serve status`: what the stages of a running server are doing."""

from __future__ import annotations

import time
from collections.abc import Callable

import httpx
from rich.live import Live

from blip2_serve import client
from blip2_serve.cli.terminal import out, stages

EVERY_S = 1.0


def show(server: httpx.Client) -> None:
    """Prints the table once. Raises StartupError as `client.get` does."""
    out.print(stages(client.get(server, "/v1/status")))


def watch(server: httpx.Client, wait: Callable[[float], None] = time.sleep) -> None:
    """Prints the table anew every second, until Ctrl-C. Raises StartupError as `client.get`."""
    with Live(console=out, auto_refresh=False) as live:
        try:
            while True:
                live.update(stages(client.get(server, "/v1/status")), refresh=True)
                wait(EVERY_S)
        except KeyboardInterrupt:
            return
