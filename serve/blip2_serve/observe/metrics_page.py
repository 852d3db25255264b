"""The page at /metrics: merges all nodes' exporter pages, keeping this application's metrics."""

from __future__ import annotations

import asyncio
import ssl
from collections.abc import Mapping

import httpx
from prometheus_client.exposition import CONTENT_TYPE_PLAIN_0_0_4 as CONTENT_TYPE

from blip2_serve.concurrency import gather
from blip2_serve.observe.metrics import NODE_UP

__all__ = ["CONTENT_TYPE", "MetricsPage", "render"]

KEPT = ("ray_blip2_", "ray_serve_")


class MetricsPage:
    """Fetches the nodes' pages and merges them."""

    def __init__(self) -> None:
        # Made once, without the authorities that httpx would load for 26 ms: the pages are http.
        no_authority = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        self._client = httpx.AsyncClient(trust_env=False, verify=no_authority)

    async def page(self, nodes: Mapping[str, str], within_s: float) -> str:
        """Returns the page, in Prometheus' text format (CONTENT_TYPE).

        `nodes` maps each node's name to the URL of its page. Nodes that do not answer within
        `within_s` seconds are marked as down.
        """
        texts = await gather(self._page_of(url, within_s) for url in nodes.values())
        return await asyncio.to_thread(render, dict(zip(nodes, texts, strict=True)))

    async def _page_of(self, url: str, within_s: float) -> str | None:
        try:
            async with asyncio.timeout(within_s):
                response = await self._client.get(url, timeout=within_s)
            response.raise_for_status()
        except (httpx.HTTPError, TimeoutError):
            return None
        return response.text


def render(pages: Mapping[str, str | None]) -> str:
    """Merges pages by node, None for a node without one.

    Line by line: a parser takes 40 ms of Python for 1,000 lines, and requests wait for that.
    """
    families: dict[str, list[str]] = {}
    known: set[tuple[str, str]] = set()
    for page in pages.values():
        family: list[str] | None = None
        for line in (page or "").split("\n"):
            if line.startswith(("# HELP ", "# TYPE ")):
                _, kind, name, *_ = line.split(" ", 3)
                family = families.setdefault(name, []) if name.startswith(KEPT) else None
                if (kind, name) in known:  # from another node's page
                    continue
                known.add((kind, name))
            if family is not None and line:
                family.append(line)
    name = NODE_UP.exported
    families[name] = [f"# HELP {name} {NODE_UP.help}", f"# TYPE {name} gauge"]
    for node, page in pages.items():
        families[name].append(f'{name}{{node="{node}"}} {float(page is not None)}')
    return "".join(f"{line}\n" for family in families.values() for line in family)
