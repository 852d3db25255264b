"""Stages on separate pools of nodes, as in the overlay prod; nodes that come and go."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import psutil
import pytest
from ray._private.node import Node

from blip2_serve.demo import scenes
from support.cluster import RayNodes, ray_nodes
from support.images import data_url
from support.manifests import build, ray_environment
from support.server import wait_until

pytestmark = pytest.mark.long

POOLS = {"Ingress": "preprocess", "Preprocessor": "preprocess", "Encoder": "encode"}
SCENE = scenes.sample(9_101)
LONG = {"image": data_url(SCENE.image), "max_tokens": 400, "ignore_eos": True}
SCHEDULED_WITHIN_S = 60
ANSWERED_WITHIN_S = 10  # after the loss of a node


def config() -> dict[str, Any]:
    """The stages of prod on nodes without GPUs: only custom resources distinguish the pools."""

    def stage(pool: str, **more: Any) -> dict[str, Any]:
        return {"num_cpus": 0.1, "resources": {f"blip2_{pool}": 0.01}, **more}

    return {
        "applications": [
            {
                "name": "blip2",
                "route_prefix": "/",
                "import_path": "blip2_serve.app:build",
                "args": {
                    "model": "demo",
                    "device": "cpu",
                    "ingress": stage("preprocess"),
                    "preprocessor": stage("preprocess"),
                    "encoder": stage("encode", threads=1),
                    "generator": {
                        **stage("generate", threads=1, num_replicas=2),
                        "resources": {"blip2_generate": 1},
                    },
                },
            }
        ]
    }


@pytest.fixture(scope="module")
def nodes() -> Iterator[RayNodes]:
    environment = ray_environment(build("prod"))
    for name in ("RAY_SERVE_ENABLE_HA_PROXY", "RAY_SERVE_HAPROXY_BINARY_PATH"):
        del environment[name]  # the image's; see test_dev_cpu.py
    with ray_nodes(environment) as nodes:
        yield nodes


@pytest.fixture(scope="module")
def pools(nodes: RayNodes) -> dict[str, Node]:
    """One node per pool. The generator's second replica has to wait for another node."""
    names = ("preprocess", "encode", "generate")
    added = {name: nodes.add(1, {f"blip2_{name}": 1}) for name in names}
    nodes.deploy(config())
    nodes.until_ready()
    return added


@pytest.fixture(scope="module")
def second_generator(nodes: RayNodes, pools: dict[str, Node]) -> Node:
    (first,) = nodes.replicas("Generator")
    assert first["node_id"] == pools["generate"].node_id
    added = nodes.add(1, {"blip2_generate": 1})
    wait_until(lambda: len(nodes.replicas("Generator")) == 2, SCHEDULED_WITHIN_S)
    return added


def test_stages_land_on_their_pools(nodes: RayNodes, pools: dict[str, Node]) -> None:
    for deployment, pool in {**POOLS, "Generator": "generate"}.items():
        placed = {replica["node_id"] for replica in nodes.replicas(deployment)}
        assert placed == {pools[pool].node_id}, deployment
    assert ask(nodes, {"image": LONG["image"]}) == httpx.codes.OK


def test_a_node_that_is_added_takes_work(nodes: RayNodes, second_generator: Node) -> None:
    replicas = {replica["node_id"]: replica for replica in nodes.replicas("Generator")}
    process = psutil.Process(replicas[second_generator.node_id]["pid"])
    before = sum(process.cpu_times()[:2])
    with ThreadPoolExecutor(8) as threads:
        statuses = [*threads.map(lambda _: ask(nodes, LONG), range(8))]
    assert statuses == [httpx.codes.OK] * 8
    assert (
        sum(process.cpu_times()[:2]) - before > 0.5
    )  # seconds; an idle replica needs a few hundredths


def test_a_lost_node_takes_only_what_it_was_working_on(
    nodes: RayNodes, pools: dict[str, Node], second_generator: Node
) -> None:
    statuses: list[int] = []
    stop = threading.Event()

    def keep_asking() -> None:
        while not stop.is_set():
            statuses.append(ask(nodes, LONG))

    with ThreadPoolExecutor(4) as threads:
        users = [threads.submit(keep_asking) for _ in range(4)]
        wait_until(lambda: len(statuses) >= 4)
        nodes.lose(pools["generate"])
        lost_at = time.monotonic()
        while time.monotonic() < lost_at + ANSWERED_WITHIN_S:
            time.sleep(0.1)  # the users keep asking meanwhile
        stop.set()
        after = [threads.submit(ask, nodes, LONG) for _ in range(4)]
        for user in users:
            user.result()
        assert [future.result() for future in after] == [httpx.codes.OK] * 4
    assert set(statuses) <= {httpx.codes.OK, httpx.codes.SERVICE_UNAVAILABLE}
    left = {replica["node_id"] for replica in nodes.replicas("Generator")}
    assert second_generator.node_id in left


def ask(nodes: RayNodes, body: dict[str, Any]) -> int:
    return httpx.post(f"{nodes.url}/v1/generate", json=body, timeout=60).status_code
