"""The overlay prod on nodes as large as its pods: nodes are lost, drained and added under load."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from ray._private.node import Node
from ray.autoscaler._private.kuberay.autoscaling_config import _get_ray_resources_from_group_spec

from support.cluster import RayNodes, ray_nodes
from support.manifests import build, ray_environment, ray_service, serve_config
from tests.chaos.deployed import PATIENT, STAGES, check_nothing_lost, overridden, under_load
from tests.chaos.history import Fault, now

pytestmark = pytest.mark.soak

RATE = 3.0  # requests per second, which the cores can answer while replicas start
GROUPS = ("preprocess", "encode", "generate")
STAGE_OF = {"encode": "Encoder", "generate": "Generator", "preprocess": "Preprocessor"}
EACH = 2  # replicas of a stage, and nodes of a group, at least


class Prod:
    """The cluster of the overlay, on a CPU and with the shipped checkpoint."""

    def __init__(self, nodes: RayNodes) -> None:
        self.nodes = nodes
        self.config = serve_config("prod")
        (application,) = self.config["applications"]
        args = application["args"]
        args |= {"model": "demo", "device": "cpu", "dtype": "float32"}
        del args["max_model_len"]  # more than the shipped checkpoint has
        args["ingress"]["admission"] = PATIENT
        for stage in ("preprocessor", "encoder", "generator"):
            args[stage]["threads"] = 1
        self._groups: list[dict[str, Any]] = ray_service(build("prod"))["spec"]["rayClusterConfig"][
            "workerGroupSpecs"
        ]
        self._members: dict[str, Node] = {}

    def add(self, group: str) -> None:
        """Adds a node that is as large as a pod of the group."""
        (spec,) = (spec for spec in self._groups if spec["groupName"] == group)
        pod = _get_ray_resources_from_group_spec(spec, False)
        pools = {name: amount for name, amount in pod.items() if name.startswith("blip2_")}
        node = self.nodes.add(pod["CPU"], pools, pod.get("GPU", 0))
        self._members[node.node_id] = node

    def take(self, group: str) -> tuple[Node, set[str]]:
        """One of the nodes that a group's stage runs on, and the ids of all replicas there."""
        node_id = self.nodes.replicas(STAGE_OF[group])[0]["node_id"]
        there = {
            replica["replica_id"]
            for found in self.nodes.all_replicas().values()
            for replica in found
            if replica.get("node_id") == node_id
        }
        return self._members.pop(node_id), there


@pytest.fixture(scope="module")
def prod() -> Iterator[Prod]:
    environment = ray_environment(build("prod"))
    # HAProxy's script is in the image, and its ports may be taken here.
    for name in ("RAY_SERVE_ENABLE_HA_PROXY", "RAY_SERVE_HAPROXY_BINARY_PATH"):
        del environment[name]
    # A pod has more cores than this machine: Ray would start a worker for each.
    environment |= {"RAY_enable_worker_prestart": "0", "RAY_prestart_worker_first_driver": "0"}
    with ray_nodes(environment) as nodes:
        prod = Prod(nodes)
        for group in GROUPS * EACH:
            prod.add(group)
        nodes.deploy(prod.config)
        nodes.until_ready()
        nodes.until_replicas(dict.fromkeys(STAGES, EACH), or_more=True)
        yield prod


@pytest.mark.parametrize("group", ["encode", "generate"])
async def test_a_lost_node_loses_no_request(group: str, prod: Prod, tmp_path: Path) -> None:
    await replace_one(group, prod, prod.nodes.lose, tmp_path / "history.jsonl")


@pytest.mark.parametrize("group", GROUPS)
async def test_a_drained_node_loses_no_request(group: str, prod: Prod, tmp_path: Path) -> None:
    await replace_one(group, prod, prod.nodes.drain, tmp_path / "history.jsonl")


async def replace_one(group: str, prod: Prod, end: Callable[[Node], None], file: Path) -> None:
    """Ends a node under load, while the cluster gets another one."""
    async with under_load(prod.nodes.url, file, RATE) as writer:
        node, there = prod.take(group)
        writer.add(Fault(f"node, {end.__name__}", STAGE_OF[group], 0, now()))
        ending = asyncio.create_task(asyncio.to_thread(end, node))
        await asyncio.to_thread(prod.add, group)
        await ending
        counts = dict.fromkeys(STAGES, EACH)  # stages that scale up may ask for more
        await asyncio.to_thread(prod.nodes.until_replicas, counts, there, or_more=True)
    check_nothing_lost(file)


async def test_more_and_fewer_replicas_on_their_nodes_lose_nothing(
    prod: Prod, tmp_path: Path
) -> None:
    file, scaled = tmp_path / "history.jsonl", ("Encoder", "Generator")
    for group in ("encode", "generate"):
        prod.add(group)
    async with under_load(prod.nodes.url, file, RATE):
        for count in (1, 3, 1):
            bounds = {"autoscaling_config": {"min_replicas": count, "max_replicas": count}}
            options = dict.fromkeys(scaled, bounds)
            await asyncio.to_thread(prod.nodes.deploy, overridden(prod.config, options))
            await asyncio.to_thread(prod.nodes.until_replicas, dict.fromkeys(scaled, count))
    check_nothing_lost(file)
