"""Where the commands print, and what `up` says once the server is ready."""

from __future__ import annotations

import shlex

import httpx
from rich.console import Console

from blip2_serve import client
from blip2_serve.model.source import DEMO_PICTURE

out = Console(highlight=False, soft_wrap=True)
err = Console(stderr=True, highlight=False, soft_wrap=True)


def greet(server: httpx.Client, url: str, model_name: str) -> None:
    """Captions the shipped picture, and prints the caption and how to ask for another."""
    caption = client.caption(server, DEMO_PICTURE)
    out.print(f"\n[bold]{model_name}[/] is ready at [bold]{url}[/]")
    out.print(f"{DEMO_PICTURE.name}: {caption}\n", markup=False)
    picture = shlex.quote(f"image=@{DEMO_PICTURE}")
    out.print(f"    curl -F {picture} {url}/v1/caption\n", markup=False)
    out.print("Press Ctrl-C to stop.")
