"""`blip2-serve status`: what the stages of a running server are doing."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import httpx
from rich.live import Live
from rich.table import Table

from blip2_serve import client
from blip2_serve.cli.terminal import out

EVERY_S = 1.0
COLUMNS = ("stage", "running", "starting", "stopping", "waiting", "now", "at most")
UNITS = {"generator": ("tokens", "answers")}  # per second, now and at most; the others: images


def show(server: httpx.Client) -> None:
    """Prints the table once. Raises StartupError as `client.get` does."""
    out.print(table(client.get(server, "/v1/status")))


def watch(server: httpx.Client, wait: Callable[[float], None] = time.sleep) -> None:
    """Prints the table anew every second, until Ctrl-C. Raises StartupError as `client.get`."""
    with Live(console=out, auto_refresh=False) as live:
        try:
            while True:
                live.update(table(client.get(server, "/v1/status")), refresh=True)
                wait(EVERY_S)
        except KeyboardInterrupt:
            return


def table(status: Any) -> Table:
    """A row for each stage of the server's answer."""
    state = "ready" if status["ready"] else "not ready"
    found = Table(title=f"{status['model']}: {state}", title_justify="left", box=None)
    for column in COLUMNS:
        found.add_column(column, justify="left" if column == "stage" else "right")
    for stage in status["stages"]:
        replicas = stage["replicas"]
        units = UNITS.get(stage["name"], ("images", "images"))
        rates = zip((stage["rate_per_s"], stage["capacity_per_s"]), units, strict=True)
        found.add_row(
            stage["name"],
            *(str(replicas[state] or "") for state in ("running", "starting", "stopping")),
            "" if stage["waiting"] is None else str(stage["waiting"]),
            *("" if rate is None else f"{rate:.1f} {unit}/s" for rate, unit in rates),
        )
    return found
