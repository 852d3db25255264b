"""Runs several Ray nodes on this machine and deploys on them as KubeRay does."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import httpx
import yaml
from ray._private.node import Node
from ray.cluster_utils import Cluster

from support.server import free_port, is_successful, wait_until

READY_WITHIN_S = 120
SERVE = Path(sys.executable).with_name("serve")


@dataclass(frozen=True)
class RayNodes:
    """A head without replicas, and the workers that a test adds."""

    cluster: Cluster
    dashboard: str
    url: str

    def add(self, num_cpus: float, resources: Mapping[str, float]) -> Node:
        return self.cluster.add_node(num_cpus=num_cpus, resources=dict(resources))

    def lose(self, node: Node) -> None:
        """Kills a node, as if its machine had failed."""
        self.cluster.remove_node(node, allow_graceful=False)

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
        details = httpx.get(self._applications, timeout=60).json()["applications"]
        (application,) = details.values()
        replicas = application["deployments"].get(deployment, {}).get("replicas", [])
        return [replica for replica in replicas if replica["state"] == "RUNNING"]

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
    with mock.patch.dict(os.environ, {**environment, **own}):
        cluster = Cluster(
            initialize_head=True,
            head_node_args={"num_cpus": 0, "include_dashboard": True, "dashboard_port": port},
        )
        try:
            dashboard = f"http://127.0.0.1:{port}"
            nodes = RayNodes(cluster, dashboard, f"http://127.0.0.1:{free_port()}")
            wait_until(lambda: is_successful(nodes._applications), READY_WITHIN_S)
            yield nodes
        finally:
            cluster.shutdown()
            shutil.rmtree(folder, ignore_errors=True)
