"""Reads the alert rules and the dashboard, and runs Prometheus to evaluate them."""

from __future__ import annotations

import contextlib
import json
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml

from support.server import free_port, is_successful, wait_until

ROOT = Path(__file__).parents[2]
MONITORING = ROOT / "k8s/monitoring"
ALERTS_TEST = ROOT / "tests/monitoring/alerts_test.yaml"


def needs(program: str) -> None:
    """Skips the test if the program is not installed."""
    if shutil.which(program) is None:
        pytest.skip(f"{program} is not installed (apt-get install prometheus)")


def rule_groups() -> list[dict[str, Any]]:
    manifest = yaml.safe_load((MONITORING / "prometheusrule.yaml").read_text())
    groups: list[dict[str, Any]] = manifest["spec"]["groups"]
    return groups


def write_rules(path: Path) -> Path:
    """Writes the rules in Prometheus' own format."""
    path.write_text(yaml.safe_dump({"groups": rule_groups()}))
    return path


def dashboard_expressions() -> dict[str, str]:
    """Returns the queries of all panels, by panel title and query id."""
    dashboard = json.loads((MONITORING / "dashboards/blip2-serve.json").read_text())
    queries = [
        (f"{panel['title']} {target['refId']}", target["expr"])
        for panel in dashboard["panels"]
        for target in panel.get("targets", ())
    ]
    assert len({name for name, _ in queries}) == len(queries), "two panels have the same title"
    return dict(queries)


class Prometheus:
    """A client for a running Prometheus."""

    def __init__(self, url: str) -> None:
        self._url = url

    def query(self, expression: str) -> list[dict[str, Any]]:
        """Returns the samples of an instant query."""
        response = httpx.get(f"{self._url}/api/v1/query", params={"query": expression}, timeout=30)
        answer = response.json()
        assert answer["status"] == "success", f"{expression}: {answer['error']}"
        result: list[dict[str, Any]] = answer["data"]["result"]
        return result

    def wait_for(self, expression: str, within_s: float = 60) -> None:
        wait_until(lambda: bool(self.query(expression)), within_s)


@contextlib.contextmanager
def prometheus(folder: Path, targets: dict[str, str]) -> Iterator[Prometheus]:
    """Runs a Prometheus that scrapes `targets`, which maps jobs to host:port/path."""
    needs("prometheus")
    port = free_port()
    jobs = []
    for name, target in targets.items():
        host, _, path = target.partition("/")
        static = [{"targets": [host]}]
        jobs.append({"job_name": name, "metrics_path": f"/{path}", "static_configs": static})
    config = {
        # A scrape times out after one interval, and on two busy cores a page can take a second.
        "global": {"scrape_interval": "4s", "scrape_timeout": "4s", "evaluation_interval": "1s"},
        "rule_files": [str(write_rules(folder / "rules.yaml"))],
        "scrape_configs": jobs,
    }
    (folder / "prometheus.yaml").write_text(yaml.safe_dump(config))
    with (folder / "log").open("w") as log:
        process = subprocess.Popen(
            [
                "prometheus",
                f"--config.file={folder / 'prometheus.yaml'}",
                f"--storage.tsdb.path={folder / 'data'}",
                f"--web.listen-address=127.0.0.1:{port}",
            ],
            stdout=log,
            stderr=log,
        )
    try:
        url = f"http://127.0.0.1:{port}"
        wait_until(lambda: is_successful(f"{url}/-/ready"), 60)
        yield Prometheus(url)
    finally:
        process.terminate()
        process.wait()
