"""How long a sequence stays in the engine after its streaming client has gone away.

    python loadtest/bench/disconnect.py [--rounds 20]

Starts the shipped checkpoint on a Ray of its own. Prints milliseconds from closing the connection
until the engine's state shows the sequence gone (asked every millisecond or so, so a little less).
"""

from __future__ import annotations

import argparse
import base64
import logging
import statistics
import time

import httpx
import ray
from ray import serve
from ray.serve.schema import LoggingConfig

from blip2_serve.app import build
from blip2_serve.config import AppConfig
from blip2_serve.model.source import DEMO_PICTURE

PORT = 8765


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=20)
    rounds = parser.parse_args().rounds

    ray.init(address="local", include_dashboard=False, logging_level=logging.WARNING)
    quiet = LoggingConfig(log_level="WARNING")
    serve.start(http_options={"port": PORT}, logging_config=quiet)
    serve.run(build(AppConfig()), logging_config=quiet)
    try:
        times = sorted(one_round() for _ in range(rounds))
        print(
            f"{rounds} rounds: median {statistics.median(times):.0f} ms, "
            f"least {times[0]:.0f}, most {times[-1]:.0f}"
        )
    finally:
        serve.shutdown()
        ray.shutdown()


def one_round() -> float:
    generator = serve.get_deployment_handle("Generator", "default")
    image = "data:image/png;base64," + base64.b64encode(DEMO_PICTURE.read_bytes()).decode()
    body = {"image": image, "max_tokens": 480, "ignore_eos": True, "stream": True}
    url = f"http://127.0.0.1:{PORT}/v1/generate"
    with httpx.stream("POST", url, json=body, timeout=60, trust_env=False) as response:
        lines = response.iter_lines()
        for _ in range(5):
            next(lines)
        assert generator.stats.remote().result()["running"] == 1
    closed = time.perf_counter()
    while generator.stats.remote().result()["running"]:
        time.sleep(0.001)
    return (time.perf_counter() - closed) * 1000


if __name__ == "__main__":
    main()
