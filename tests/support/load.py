"""Runs locust in its own process, because importing it patches the standard library."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from loadtest.load import samples
from loadtest.load.samples import Sample

LOCUSTFILE = Path(__file__).parents[2] / "loadtest" / "locustfile.py"
WITHIN_S = 240


@dataclass(frozen=True)
class Run:
    """A finished run of locust."""

    code: int
    output: str
    samples: list[Sample]

    def latencies(self, kind: str | None = None) -> list[Sample]:
        return [s for s in self.samples if s.measure == "latency" and kind in (None, s.kind)]

    @property
    def failures(self) -> set[str]:
        return {f"{s.kind}: {s.failure}" for s in self.samples if s.failure}


def closed(users: float, seconds: float, *kinds: str, think_s: float = 0.05) -> dict[str, Any]:
    return {
        "weights": dict.fromkeys(kinds, 1),
        "load": {"level": users},
        "seconds": seconds,
        "think_s": [think_s, think_s],
    }


def command(folder: Path, url: str, scenario: dict[str, Any], slos: dict[str, Any]) -> list[str]:
    """Returns a command line that runs the scenario headless and writes results to `folder`."""
    scenario_file, slo_file = folder / "scenario.yaml", folder / "slo.yaml"
    scenario_file.write_text(json.dumps({"about": "a test", **scenario}))  # JSON is YAML
    slo_file.write_text(json.dumps(slos))
    own = ["--scenario", str(scenario_file), "--slo", str(slo_file), "--output", str(folder)]
    return [sys.executable, "-m", "locust", "-f", str(LOCUSTFILE), "--headless", "-H", url, *own]


def run(
    folder: Path, url: str, scenario: dict[str, Any], slos: dict[str, Any] | None = None
) -> Run:
    """Runs a scenario to its end. By default, its SLO is that no request fails."""
    arguments = command(folder, url, scenario, {"error_ratio": 0} if slos is None else slos)
    return finished(folder, start(arguments))


def start(arguments: list[str]) -> subprocess.Popen[str]:
    # Requests to this machine must not go through a proxy; this one does not exist.
    proxies = {f"{kind}_proxy": "http://127.0.0.1:9" for kind in ("http", "https", "all")}
    environment = {**os.environ, **proxies, "PYTHONWARNINGS": "ignore"}
    for name in ("no_proxy", "NO_PROXY"):
        environment.pop(name, None)
    return subprocess.Popen(
        arguments, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment
    )


def finished(folder: Path, process: subprocess.Popen[str]) -> Run:
    try:
        output, _ = process.communicate(timeout=WITHIN_S)
    finally:
        process.kill()
    path = folder / samples.FILE
    assert path.exists(), output
    return Run(process.returncode, output, samples.read(path))
