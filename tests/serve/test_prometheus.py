"""Prometheus scrapes a running application: all metrics exist, all panels and rules have data."""

from __future__ import annotations

import asyncio
import contextlib
import http.server
import io
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest
import ray
from PIL import Image
from ray import serve

from blip2_serve.demo import scenes
from blip2_serve.observe import metrics
from blip2_serve.observe.metrics import Histogram
from blip2_serve.stages.calls import MAX_ATTEMPTS
from blip2_serve.types import Call
from support.background import serving
from support.images import data_url, image_message
from support.monitoring import (
    Prometheus,
    dashboard_expressions,
    needs,
    prometheus,
    rule_groups,
)
from support.server import App, start_app, wait_until

GPU_FIXTURE = Path(__file__).with_name("gpu.prom")
CHAT = "/v1/chat/completions"
MOST_HELD_BYTES = 1 << 20  # of all requests under way; each of the usual ones has some 10 KB


@pytest.fixture(scope="module")
def app(base_url: str) -> Iterator[App]:
    """An application with a stage that scales, so that autoscaling metrics exist."""
    stage = {"autoscaling": {"min_replicas": 1, "max_replicas": 2}}
    config: dict[str, Any] = {
        "dtype": "float32",
        "preprocessor": stage,
        "generator": {"kv_slots": 400},
        "ingress": {"admission": {"max_held_bytes": MOST_HELD_BYTES}},
    }
    app = start_app(base_url, "watched", config)
    yield app
    serve.delete(app.name)


def image(seed: int) -> Image.Image:
    return scenes.sample(seed).image


async def traffic(app: App) -> None:
    """Sends requests that together change every metric, but those of lost replicas."""
    await expire(app)
    async with app.client() as client:
        await overload(client)
        same = [client.post(CHAT, json=chat(1, "what is there?")) for _ in range(4)]
        streams = [client.post(CHAT, json=chat(seed, stream=True)) for seed in range(2, 6)]
        await asyncio.gather(*same, *streams)
        await client.post(CHAT, json=chat(1, "what is there?"))  # hits both caches
        await client.post(CHAT, json=chat(1, "red " * 450))  # exceeds the KV cache
        await client.post("/v1/caption", json={"image": data_url(b"no image")})
        await leave(client)


def chat(seed: int, question: str | None = None, **more: Any) -> dict[str, Any]:
    return {"messages": [image_message(image(seed), question)], **more}


async def leave(client: httpx.AsyncClient) -> None:
    """Disconnects from streams for which the generator has room for only one at a time."""

    async def read(seed: int) -> None:
        body = chat(seed, stream=True, max_tokens=300, ignore_eos=True)
        async with client.stream("POST", CHAT, json=body) as response:
            async for _ in response.aiter_bytes():
                break

    streams = [asyncio.create_task(read(seed)) for seed in range(30, 38)]
    await asyncio.wait(streams, return_when=asyncio.FIRST_COMPLETED)
    for stream in streams:
        stream.cancel()
    await asyncio.wait(streams)


async def overload(client: httpx.AsyncClient) -> None:
    """Sends bodies that cannot all be held at once, and a request that has no time."""
    body = b" " * MOST_HELD_BYTES
    answers = await asyncio.gather(*(client.post(CHAT, content=body) for _ in range(4)))
    assert httpx.codes.TOO_MANY_REQUESTS in {answer.status_code for answer in answers}
    late = {"x-request-timeout-seconds": "0.05"}
    long = chat(20, max_tokens=300, ignore_eos=True, num_beams=5)
    answer = await client.post(CHAT, json=long, headers=late)
    assert answer.status_code == httpx.codes.REQUEST_TIMEOUT


async def expire(app: App) -> None:
    """Gives the encoder an image whose time is over before its turn comes."""
    file = io.BytesIO()
    image(22).save(file, "PNG")
    preprocessor = serve.get_deployment_handle("Preprocessor", app.name)
    pixels = await preprocessor.pixels.remote(file.getvalue())
    encoder = serve.get_deployment_handle("Encoder", app.name)
    with contextlib.suppress(Exception):
        await encoder.encode.remote(pixels, "late", call=Call("late", 0.0))


async def lose_replicas(app: App) -> None:
    """Kills the generator's replica during a stream, until the stream is given up."""
    body = chat(23, stream=True, max_tokens=300, ignore_eos=True)
    killed: set[int] = set()
    text = ""
    async with app.client() as client, client.stream("POST", CHAT, json=body) as response:
        async for piece in response.aiter_text():
            text += piece
            for process in generators(app):
                if process.pid not in killed and len(killed) < MAX_ATTEMPTS:
                    process.kill()
                    killed.add(process.pid)
    assert len(killed) == MAX_ATTEMPTS
    assert '"quarantined"' in text


def generators(app: App) -> list[psutil.Process]:
    title = f"ray::ServeReplica:{app.name}:Generator"
    found = []
    for process in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.Error):
            if (process.cmdline() or [""])[0].startswith(title):
                found.append(process)
    return found


@contextlib.contextmanager
def gpu_page() -> Iterator[str]:
    """Serves recorded metrics of a GPU; yields host:port."""

    class Page(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200)
            self.end_headers()
            self.wfile.write(GPU_FIXTURE.read_bytes())

        def log_message(self, *_: object) -> None:
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Page)
    with serving(server):
        yield f"127.0.0.1:{server.server_port}"


@pytest.fixture(scope="module")
def scraping(app: App, tmp_path_factory: pytest.TempPathFactory) -> Any:
    needs("prometheus")
    targets = {"blip2-serve": f"{app.url.removeprefix('http://')}/metrics"}
    folder = tmp_path_factory.mktemp("prometheus")
    with gpu_page() as gpu, prometheus(folder, {**targets, "gpu": f"{gpu}/metrics"}) as scraping:
        asyncio.run(lose_replicas(app))
        wait_until(lambda: app.post(CHAT, json=chat(1)).is_success)
        cancelled = 'sum(ray_blip2_requests_total{outcome="cancelled"})'
        asyncio.run(traffic(app))
        scraping.wait_for(cancelled)
        before = scraping.query(cancelled)[0]["value"][1]
        # Once more, because a rate needs two values.
        asyncio.run(traffic(app))
        scraping.wait_for(f"{cancelled} > {before}")
        yield scraping


def exported(metric: metrics.Metric) -> list[str]:
    if isinstance(metric, Histogram):
        return [f"{metric.exported}_{part}" for part in ("bucket", "count")]
    return [metric.exported]


@pytest.mark.parametrize(
    "name", [name for metric in metrics.catalogue() for name in exported(metric)]
)
def test_every_metric_exists(scraping: Prometheus, name: str) -> None:
    scraping.wait_for(name)


def test_labels_match_the_catalogue(scraping: Prometheus) -> None:
    added = {"__name__", "job", "instance", "le", "deployment", "replica", "application"}
    added |= {"Component", "NodeAddress", "SessionName", "Version", "WorkerId", "otel_scope_name"}
    for metric in metrics.catalogue():
        for name in exported(metric):
            for sample in scraping.query(f'{name}{{job="blip2-serve"}}'):
                assert {*sample["metric"]} - added == {*metric.labels} - {"deployment"}, name


def test_histograms_have_exact_totals(scraping: Prometheus) -> None:
    scraping.wait_for("sum(ray_blip2_image_bytes_exact_total) > 0")
    scraping.wait_for("sum(ray_blip2_image_bytes_count) > 0")


@pytest.mark.parametrize("panel", dashboard_expressions())
def test_every_panel_has_data(scraping: Prometheus, panel: str) -> None:
    scraping.wait_for(dashboard_expressions()[panel].replace("$__rate_interval", "1m"))


@pytest.mark.parametrize(
    "expression",
    [rule["expr"] for group in rule_groups() for rule in group["rules"] if "record" in rule],
)
def test_every_recording_rule_has_data(scraping: Prometheus, expression: str) -> None:
    scraping.wait_for(expression)


def test_the_metrics_page_covers_every_node_without_rays_own_metrics(app: App) -> None:
    nodes = {f"{n['NodeManagerAddress']}:{n['MetricsExportPort']}" for n in ray.nodes()}
    page = httpx.get(f"{app.url}/metrics", timeout=30).text
    answered = re.findall(r'^ray_blip2_node_up{node="(.+)"} 1\.0$', page, re.MULTILINE)
    assert {*answered} == nodes
    names = re.findall(r"^(\w+)", page, re.MULTILINE)
    assert [name for name in names if not name.startswith(("ray_blip2_", "ray_serve_"))] == []


def test_responses_have_the_id_of_the_request(app: App) -> None:
    response = app.post(CHAT, json=chat(1), headers={"x-request-id": "set-by-a-test"})

    assert response.headers["x-request-id"] == "set-by-a-test"
    assert app.post(CHAT, json=chat(1)).headers["x-request-id"] not in ("", "set-by-a-test")
