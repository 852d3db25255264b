"""The page at /metrics: the pages of all nodes' exporters as one, of this application only."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable, Mapping

import httpx
from prometheus_client import CollectorRegistry
from prometheus_client.core import GaugeMetricFamily, Metric
from prometheus_client.exposition import choose_encoder
from prometheus_client.parser import text_string_to_metric_families

from blip2_serve.concurrency import gather
from blip2_serve.observe.metrics import NODE_UP

KEPT = ("ray_blip2_", "ray_serve_")
NODE_TIMEOUT_S = 1.0


class MetricsPage:
    """Asks the nodes for their pages and makes one of them."""

    def __init__(self) -> None:
        # Made once: it takes as long as asking a node.
        self._client = httpx.AsyncClient(timeout=NODE_TIMEOUT_S, trust_env=False)

    async def page(self, nodes: Mapping[str, str], accept: str) -> tuple[bytes, str]:
        """The page and its content type; `nodes` has the address of each node's own page.

        In OpenMetrics where `accept` asks for it. A node that does not answer in time is marked so.
        """
        texts = await gather(map(self._page_of, nodes.values()))
        # Parsing takes some 8 ms of Python for every hundred lines.
        return await asyncio.to_thread(render, dict(zip(nodes, texts, strict=True)), accept)

    async def _page_of(self, url: str) -> str | None:
        try:
            async with asyncio.timeout(NODE_TIMEOUT_S):
                response = await self._client.get(url)
            response.raise_for_status()
        except (httpx.HTTPError, TimeoutError):
            return None
        return response.text


def render(pages: Mapping[str, str | None], accept: str) -> tuple[bytes, str]:
    """By node, its page or None if there is none -> one page and its content type."""
    families: dict[str, Metric] = {}
    for page in pages.values():
        for family in text_string_to_metric_families(_kept_lines(page or "")):
            families.setdefault(family.name, family)
            if families[family.name] is not family:
                families[family.name].samples += family.samples
    answered = GaugeMetricFamily(NODE_UP.exported, NODE_UP.help, labels=["node"])
    for node, page in pages.items():
        answered.add_metric([node], page is not None)
    registry = CollectorRegistry(auto_describe=False)
    registry.register(_Families([*families.values(), answered]))
    encode, content_type = choose_encoder(accept)
    return encode(registry), content_type


class _Families:
    def __init__(self, families: Iterable[Metric]) -> None:
        self._families = families

    def collect(self) -> Iterable[Metric]:
        return self._families


def _kept_lines(page: str) -> str:
    """Most of a node's page is about Ray itself; it is left out before it is parsed."""
    starts = (*KEPT, *(f"# {kind} {name}" for kind in ("HELP", "TYPE") for name in KEPT))
    return "".join(f"{line}\n" for line in page.splitlines() if line.startswith(starts))
