"""The page at /metrics: merges all nodes' exporter pages, keeping this application's metrics."""

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
    """Fetches the nodes' pages and merges them."""

    def __init__(self) -> None:
        # Made once: making it takes as long as fetching a page.
        self._client = httpx.AsyncClient(timeout=NODE_TIMEOUT_S, trust_env=False)

    async def page(self, nodes: Mapping[str, str], accept: str) -> tuple[bytes, str]:
        """Returns the page and its content type.

        `nodes` maps each node's name to the URL of its page. The format is OpenMetrics if `accept`
        (the request's header) asks for it. Nodes that do not answer in time are marked as down.
        """
        texts = await gather(map(self._page_of, nodes.values()))
        # Parsing takes about 8 ms of Python per hundred lines.
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
    """Merges pages by node, None for a node without one. Returns the page and its content type."""
    families: dict[str, Metric] = {}
    for page in pages.values():
        for family in text_string_to_metric_families(_kept_lines(page or "")):
            families.setdefault(family.name, family)
            if families[family.name] is not family:
                families[family.name].samples += family.samples
    node_up = GaugeMetricFamily(NODE_UP.exported, NODE_UP.help, labels=["node"])
    for node, page in pages.items():
        node_up.add_metric([node], page is not None)
    registry = CollectorRegistry(auto_describe=False)
    registry.register(_Families([*families.values(), node_up]))
    encode, content_type = choose_encoder(accept)
    return encode(registry), content_type


class _Families:
    """A collector, as prometheus_client's registry wants one."""

    def __init__(self, families: Iterable[Metric]) -> None:
        self._families = families

    def collect(self) -> Iterable[Metric]:
        return self._families


def _kept_lines(page: str) -> str:
    """Drops the metrics of Ray itself, most of the page, before parsing: parsing is slow."""
    starts = (*KEPT, *(f"# {kind} {name}" for kind in ("HELP", "TYPE") for name in KEPT))
    return "".join(f"{line}\n" for line in page.splitlines() if line.startswith(starts))
