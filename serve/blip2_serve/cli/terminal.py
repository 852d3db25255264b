"""Where the commands print, and what `up` says once the server is ready."""

from __future__ import annotations

import contextlib
import shlex
from collections.abc import Iterable
from typing import Any

import httpx
from rich.console import Console
from rich.table import Table

from blip2_serve import client
from blip2_serve.config import AppConfig
from blip2_serve.doctor import Finding
from blip2_serve.errors import StartupError
from blip2_serve.model.source import DEMO_PICTURE

out = Console(highlight=False, soft_wrap=True)
COLUMNS = ("stage", "replicas", "waiting", "now", "at most")
UNITS = {"generator": ("tokens", "answers")}  # per second, now and at most; the others: images
MARKS = {"good": ("green", "ok "), "odd": ("yellow", "odd"), "bad": ("red", "BAD")}
err = Console(stderr=True, highlight=False, soft_wrap=True)


def report(findings: Iterable[Finding]) -> bool:
    """Prints findings, each with what to do about it; returns whether none of them is bad."""
    good = True
    for finding in findings:
        good = good and finding.state != "bad"
        colour, mark = MARKS[finding.state]
        out.print(f"[{colour}]{mark}[/] {finding.about}: ", end="")
        out.print(finding.seen, markup=False)
        if finding.advice:
            out.print(f"  -> {finding.advice}", markup=False)
    return good


def stages(status: Any) -> Table:
    """A row for each stage of the server's answer."""
    state = "ready" if status["ready"] else "not ready"
    found = Table(title=f"{status['model']}: {state}", title_justify="left", box=None)
    for column in COLUMNS:
        left = column in ("stage", "replicas")
        found.add_column(column, justify="left" if left else "right", no_wrap=True)
    for stage in status["stages"]:
        running = str(stage["replicas"]["running"])
        others = [f"{n} {s}" for s, n in stage["replicas"].items() if n and s != "running"]
        units = UNITS.get(stage["name"], ("images", "images"))
        rates = zip((stage["rate_per_s"], stage["capacity_per_s"]), units, strict=True)
        found.add_row(
            stage["name"],
            ", ".join([running, *others]),
            "" if stage["waiting"] is None else str(stage["waiting"]),
            *("" if rate is None else f"{rate:.1f} {unit}/s" for rate, unit in rates),
        )
    return found


def greet(server: httpx.Client, url: str, config: AppConfig) -> None:
    """Says that the server is ready, and how to ask it.

    If anybody may ask, shows its stages and a caption.
    """
    needs_key = config.ingress.access.keys_file is not None
    caption = None
    if not needs_key:
        with contextlib.suppress(StartupError):  # it may be busy: others ask it already
            out.print(stages(client.get(server, "/v1/status")))
            caption = client.caption(server, DEMO_PICTURE.read_bytes())
    out.print(f"\n[bold]{config.model_name}[/] is ready: open [bold]{url}[/] in a browser")
    if caption is not None:
        out.print(f"{DEMO_PICTURE.name}: {caption}", markup=False)
    picture = shlex.quote(f"image=@{DEMO_PICTURE}")
    key = f'-H "Authorization: Bearer ${client.KEY_VARIABLE}" ' if needs_key else ""
    out.print(f"\n    curl {key}-F {picture} {url}/v1/caption\n", markup=False)
    out.print("Press Ctrl-C to stop.")
