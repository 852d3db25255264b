"""An application that a cluster of this machine serves, as tests deploy and judge it."""

from __future__ import annotations

import asyncio
import re
from collections.abc import AsyncIterator, Iterator, Mapping
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path
from typing import Any

import httpx

from blip2_serve.cli.running import APP_NAME
from support.cluster import RayNodes, own_haproxy, ray_nodes
from support.manifests import build, ray_environment
from tests.chaos import checker, history
from tests.chaos.load import Load, new_session, templates, undisturbed

# Replicas that start take the cores from those that work. Nothing is refused for it.
PATIENT = {"max_wait_s": 60}
# Requests in flight. What meets no work proves nothing, and fast machines have done it soon.
AT_LEAST, AT_MOST = 4, 12

STAGES = ("Ingress", "Preprocessor", "Encoder", "Generator")


@contextmanager
def one_machine() -> Iterator[RayNodes]:
    """A head and one node, with prod's environment and an HAProxy of their own."""
    with (
        own_haproxy(ray_environment(build("prod"))) as environment,
        ray_nodes(environment) as nodes,
    ):
        nodes.add(2, {})
        yield nodes


def config(**args: Any) -> dict[str, Any]:
    """A serveConfigV2 with these `args`; its replicas reserve nothing."""
    stages = {name.lower(): {"num_cpus": 0, **args.pop(name.lower(), {})} for name in STAGES}
    stages["ingress"].setdefault("admission", PATIENT)
    own = {"model": "demo", "device": "cpu", "dtype": "float32", **stages, **args}
    application = {
        "name": APP_NAME,
        "route_prefix": "/",
        "import_path": "blip2_serve.app:build",
        "args": own,
    }
    return {"http_options": {"request_timeout_s": 120}, "applications": [application]}


def overridden(config: dict[str, Any], options: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """The config with these options of deployments, which change without new replicas."""
    (application,) = config["applications"]
    deployments = [{"name": name, **own} for name, own in options.items()]
    return {**config, "applications": [{**application, "deployments": deployments}]}


def total(nodes: RayNodes, metric: str, **labels: str) -> float:
    """The sum of a metric over all replicas that have these labels."""
    page = httpx.get(f"{nodes.url}/metrics", timeout=60).text
    lines = re.findall(rf"^ray_blip2_{metric}{{(.*)}} (.+)$", page, re.MULTILINE)
    wanted = [f'{name}="{value}"' for name, value in labels.items()]
    return sum(float(value) for found, value in lines if all(w in found for w in wanted))


@asynccontextmanager
async def under_load(
    url: str, file: Path, rate: float, *, each: int = 1, seed: int = 1
) -> AsyncIterator[history.Writer]:
    """Notes undisturbed answers, then asks during the block at `rate` requests per second or so.

    The history is written to `file`. The block may add faults to it.
    """
    writer = history.Writer(file)
    async with new_session() as session:
        some = templates(each, seed)
        expected = await undisturbed(session, url, some)
        known = list(zip(some, expected, strict=True))
        load = Load(url, known, writer, rate, seed, AT_MOST, AT_LEAST)
        async with load.running(session):
            await asyncio.sleep(1)  # so that the first change finds work
            yield writer
    writer.close()


def check_nothing_lost(file: Path) -> None:
    """Fails unless every request of a history got its undisturbed answer."""
    report = checker.check(history.read(file))
    print(report)
    assert report.verdicts
    assert report.violations == []
