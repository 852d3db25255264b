"""How many requests a second this load generator can offer at all.

    python loadtest/ceiling.py [--seconds 10] [--users 32]

One process of locust asks a server that answers at once. What comes out is the client's limit on
this machine, server included if they share cores; a test that offers more than half of it per
process measures the client. More processes: locust's workers.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

from load import samples

FOLDER = Path(__file__).parent
KINDS = ("caption", "question", "streaming chat", "photograph")


@contextlib.contextmanager
def null_server(*options: str) -> Iterator[str]:
    """Its URL."""
    command = [sys.executable, str(FOLDER / "null_server.py"), *options]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as server:
        assert server.stdout is not None
        try:
            yield server.stdout.readline().strip()
        finally:
            server.terminate()


def ceiling(url: str, kind: str, users: int, seconds: float) -> float:
    """Right answers a second."""
    with tempfile.TemporaryDirectory() as folder:
        scenario = {
            "about": "as much as there can be",
            "weights": {kind: 1},
            "load": {"level": users},
            "seconds": seconds,
            "think_s": [0, 0],
        }
        path = Path(folder) / "ceiling.yaml"
        path.write_text(json.dumps(scenario))  # JSON is YAML
        command = [sys.executable, "-m", "locust", "-f", str(FOLDER / "locustfile.py")]
        command += ["--headless", "--host", url, "--scenario", str(path), "--output", folder]
        subprocess.run(command, capture_output=True, check=False)
        found = samples.read(Path(folder) / samples.FILE)
    right = [s for s in found if s.measure == "latency" and not s.failure]
    span = max(s.time + s.value for s in right) - min(s.time for s in right)
    return len(right) / span


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--seconds", type=float, default=10)
    parser.add_argument("--users", type=int, default=32)
    args = parser.parse_args()
    with null_server() as url:
        for kind in KINDS:
            rate = ceiling(url, kind, args.users, args.seconds)
            print(f"{kind:16}{rate:8.0f} requests a second", flush=True)


if __name__ == "__main__":
    main()
