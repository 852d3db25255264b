"""Where the commands print, and what `up` says once the server is ready."""

from __future__ import annotations

import contextlib
import shlex
from collections.abc import Iterable

import httpx
from rich.console import Console

from blip2_serve import client
from blip2_serve.config import AppConfig
from blip2_serve.doctor import Finding
from blip2_serve.errors import StartupError
from blip2_serve.model.source import DEMO_PICTURE

out = Console(highlight=False, soft_wrap=True)
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


def greet(server: httpx.Client, url: str, config: AppConfig) -> None:
    """Says that the server is ready, and how to ask it; shows a caption if anybody may ask."""
    needs_key = config.ingress.access.keys_file is not None
    caption = None
    if not needs_key:
        with contextlib.suppress(StartupError):  # it may be busy: others ask it already
            caption = client.caption(server, DEMO_PICTURE.read_bytes())
    out.print(f"\n[bold]{config.model_name}[/] is ready at [bold]{url}[/]")
    if caption is not None:
        out.print(f"{DEMO_PICTURE.name}: {caption}", markup=False)
    picture = shlex.quote(f"image=@{DEMO_PICTURE}")
    key = f'-H "Authorization: Bearer ${client.KEY_VARIABLE}" ' if needs_key else ""
    out.print(f"\n    curl {key}-F {picture} {url}/v1/caption\n", markup=False)
    out.print("Press Ctrl-C to stop.")
