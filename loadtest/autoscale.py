"""A step of load against the real application: which stage gets replicas, and does anybody notice?

    python loadtest/autoscale.py [--rate 1] [--factor 8] [--seconds 60 120 180] [--output FOLDER]

Starts the shipped checkpoint on a Ray of its own, every stage free to have one to three replicas,
with generators of few places, so that the generator is what is short. Requests come at even
intervals whether or not earlier ones are answered: at --rate, then --factor times as many, then as
before. Writes autoscale.json and autoscale.png: load, queue seconds and replicas over time.

Exits with 1 if a request failed, if the generator did not get replicas and give them back, or if
another stage got any.
"""

from __future__ import annotations

import argparse
import asyncio
import io
import itertools
import json
import logging
import os
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import httpx
import matplotlib.pyplot as plt
import ray
from ray import serve

from bench.servers import free_port
from blip2_serve.app import build
from blip2_serve.config import AppConfig
from blip2_serve.demo import scenes
from load.server_series import ServerSeries

STAGES = ("Preprocessor", "Encoder", "Generator")
BOTTLENECK = "Generator"
TOKENS = 150
EVERY_S = 2.0
APP = "blip2"


@dataclass
class Moment:
    """What was so at a second since the start."""

    second: float
    sent: int
    answered: int
    failed: int
    replicas: dict[str, int]
    queue_seconds: dict[str, float]  # mean of the requests of the last 20 seconds


class Load:
    """Requests that come whether or not earlier ones are answered."""

    def __init__(self, url: str) -> None:
        self.sent = self.answered = self.failed = 0
        self.errors: list[str] = []
        self._client = httpx.AsyncClient(
            base_url=url, timeout=300, limits=httpx.Limits(), trust_env=False
        )
        self._under_way: set[asyncio.Task[None]] = set()

    async def run(self, rate: float, seconds: float) -> None:
        start = time.monotonic()
        for number in range(round(rate * seconds)):
            await asyncio.sleep(max(0.0, start + number / rate - time.monotonic()))
            task = asyncio.create_task(self._ask())
            self._under_way.add(task)
            task.add_done_callback(self._under_way.discard)
        await asyncio.sleep(max(0.0, start + seconds - time.monotonic()))

    async def finish(self) -> None:
        await asyncio.gather(*self._under_way)
        await self._client.aclose()

    async def _ask(self) -> None:
        self.sent += 1
        picture = io.BytesIO()
        scenes.sample(self.sent).image.save(picture, "PNG")
        fields = {"max_tokens": str(TOKENS), "ignore_eos": "true"}
        try:
            response = await self._client.post(
                "/v1/caption", files={"image": picture.getvalue()}, data=fields
            )
            response.raise_for_status()
            self.answered += 1
        except httpx.HTTPError as error:
            self.failed += 1
            self.errors.append(repr(error))


class Watcher:
    """Notes a moment every two seconds."""

    def __init__(self, url: str, load: Load) -> None:
        self.moments: list[Moment] = []
        self._url, self._load = url, load
        self._server = ServerSeries()

    async def run(self) -> None:
        start = time.monotonic()
        async with httpx.AsyncClient(timeout=30, trust_env=False) as client:
            while True:
                now, known = time.time(), len(self._server.points)
                self._server.add((await client.get(f"{self._url}/metrics")).text, now)
                queues = [p for p in self._server.points[known:] if p.name == "queue seconds"]
                load = self._load
                self.moments.append(
                    Moment(
                        time.monotonic() - start,
                        load.sent,
                        load.answered,
                        load.failed,
                        await asyncio.to_thread(running_replicas),
                        {p.stage.capitalize(): p.value for p in queues},
                    )
                )
                await asyncio.sleep(EVERY_S)


def running_replicas() -> dict[str, int]:
    deployments = serve.status().applications[APP].deployments
    return {stage: deployments[stage].replica_states.get("RUNNING", 0) for stage in STAGES}


def configuration() -> AppConfig:
    # Nothing in headroom: only a stage that is short is to get replicas.
    own = {"headroom": 0}
    bounds = {"min_replicas": 1, "max_replicas": 3}
    scaling = {"autoscaling": bounds, "scaling": own, "num_cpus": 0}
    # Few threads and places: on two cores replicas should be short of places, not of cores.
    few = {"threads": 1, "max_num_seqs": 2, "kv_slots": 1000}
    return AppConfig.model_validate(
        {
            "dtype": "float32",
            "ingress": {"num_cpus": 0},
            "preprocessor": scaling,
            "encoder": {**scaling, "threads": 1},
            "generator": {**scaling, **few},
        }
    )


def start() -> str:
    """The application's URL, once it is ready."""
    os.environ["RAY_AUTH_MODE"] = "disabled"
    os.environ["RAY_SERVE_PROXY_READY_CHECK_TIMEOUT_S"] = "60"
    ray.init(address="local", include_dashboard=False, logging_level=logging.ERROR)
    port = free_port()
    quiet = serve.schema.LoggingConfig(log_level="WARNING")
    serve.start(http_options={"host": "127.0.0.1", "port": port}, logging_config=quiet)
    serve.run(build(configuration()), name=APP, logging_config=quiet)
    url = f"http://127.0.0.1:{port}"
    while httpx.get(f"{url}/ready", timeout=60, trust_env=False).status_code != httpx.codes.OK:
        time.sleep(0.5)
    return url


async def measure(url: str, args: argparse.Namespace) -> tuple[Load, list[Moment]]:
    load = Load(url)
    watcher = Watcher(url, load)
    watching = asyncio.create_task(watcher.run())
    before, during, after = args.seconds
    await load.run(args.rate, before)
    await load.run(args.rate * args.factor, during)
    await load.run(args.rate, after)
    await load.finish()
    watching.cancel()
    return load, watcher.moments


def plot(moments: list[Moment], path: Path) -> None:
    figure, (top, middle, bottom) = plt.subplots(3, 1, figsize=(9, 8), sharex=True)
    seconds = [m.second for m in moments]
    gaps = [max(b - a, 1e-9) for a, b in itertools.pairwise(seconds)]
    for name in ("sent", "answered"):
        counts = [getattr(m, name) for m in moments]
        steps = itertools.pairwise(counts)
        rates = [(b - a) / gap for (a, b), gap in zip(steps, gaps, strict=True)]
        top.plot(seconds[1:], rates, label=name)
    top.set_ylabel("requests a second")
    for stage in STAGES:
        known = [(m.second, m.queue_seconds[stage]) for m in moments if stage in m.queue_seconds]
        middle.plot(*zip(*known, strict=True), ".-", label=stage)
        bottom.step(seconds, [m.replicas[stage] for m in moments], where="post", label=stage)
    middle.set_ylabel("queue seconds, as\n/metrics shows them")
    bottom.set_ylabel("running replicas")
    bottom.set_xlabel("seconds")
    for axes in (top, middle, bottom):
        axes.legend()
        axes.set_ylim(bottom=0)
    figure.tight_layout()
    figure.savefig(path, dpi=110)


def verdict(load: Load, moments: list[Moment]) -> list[str]:
    """What went wrong; nothing, if all is as it should be."""
    wrong = [f"{load.failed} of {load.sent} requests failed: {load.errors[:3]}"] * (load.failed > 0)
    for stage in STAGES:
        most, last = max(m.replicas[stage] for m in moments), moments[-1].replicas[stage]
        print(f"{stage}: at most {most} replicas, {last} at the end")
        if stage != BOTTLENECK and most > 1:
            wrong.append(f"{stage} got replicas, and is not what is short")
        if stage == BOTTLENECK and (most == 1 or last > 1):
            wrong.append(f"{stage} had {most} replicas at most, and {last} at the end")
    return wrong


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rate", type=float, default=1, help="requests a second")
    parser.add_argument("--factor", type=float, default=8)
    parser.add_argument(
        "--seconds", type=float, nargs=3, default=[60, 120, 180], help="before, during and after"
    )
    parser.add_argument("--output", type=Path, default=Path("results"))
    args = parser.parse_args()
    args.output.mkdir(parents=True, exist_ok=True)
    try:
        load, moments = asyncio.run(measure(start(), args))
    finally:
        serve.shutdown()
        ray.shutdown()
    results = {"sent": load.sent, "answered": load.answered, "failed": load.failed}
    series = [asdict(moment) for moment in moments]
    (args.output / "autoscale.json").write_text(json.dumps({**results, "moments": series}) + "\n")
    plot(moments, args.output / "autoscale.png")
    print(f"{load.sent} requests, {load.failed} failed")
    wrong = verdict(load, moments)
    for line in wrong:
        print(f"FAILED: {line}")
    return bool(wrong)


if __name__ == "__main__":
    sys.exit(main())
