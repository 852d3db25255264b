"""What the graph costs beside the work: client time less decoding, encoding and generating.

    python loadtest/bench/hops.py [--requests 60]

Sends chat completions one after another on one connection, each with a new JPEG of 640 x 480, to
the shipped checkpoint on a Ray of its own: first started as by default, then as by `--fast`. Prints
milliseconds: `total` at the client, `decode`, `encode` and `engine` inside the three stages, and
`hops`, the rest: HTTP, JSON, base64, validation, and the way from process to process and back.
"""

from __future__ import annotations

import argparse
import base64
import contextlib
import http.client
import io
import json
import logging
import os
import statistics
import subprocess
import sys
import time
from http import HTTPStatus
from typing import Any
from unittest.mock import patch

import numpy as np
from PIL import Image

from blip2_serve import environment, fast_mode
from blip2_serve.config import AppConfig

PORT = {"default": 8766, "fast": 8767}
PARTS = ("total", "decode", "encode", "engine", "hops")
WARM_UP = 10
Times = list[dict[str, float]]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--requests", type=int, default=60)
    parser.add_argument("--profile", choices=PORT, help="measure this one only; prints JSON")
    arguments = parser.parse_args()
    if arguments.profile:
        print(json.dumps(measure(arguments.profile, arguments.requests)))
        return
    print(f"{'':16}" + "".join(f"{part:>10}" for part in PARTS))
    for profile in PORT:
        command = [sys.executable, __file__, "--profile", profile]
        command += ["--requests", str(arguments.requests)]
        # A process each: Ray reads its environment when it is imported.
        done = subprocess.run(command, stdout=subprocess.PIPE, check=True)
        times: Times = json.loads(done.stdout.splitlines()[-1])
        for name, rank in (("p50", 50), ("p90", 90)):
            row = (statistics.quantiles([t[p] for t in times], n=100)[rank - 1] for p in PARTS)
            print(f"{profile + ' ' + name:16}" + "".join(f"{ms:10.1f}" for ms in row))


def measure(profile: str, requests: int) -> Times:
    """Milliseconds of each request by part, with an application of its own."""
    config = AppConfig()
    default = patch.dict(os.environ, environment.short_hops(config))
    with fast_mode.profile(config) if profile == "fast" else default:
        # The handles here are asked without an event loop: they get their own, the replicas' not.
        with patch.dict(os.environ, {"RAY_SERVE_RUN_ROUTER_IN_SEPARATE_LOOP": "1"}):
            import ray
            from ray import serve
            from ray.serve.schema import LoggingConfig

            from blip2_serve.app import build

        ray.init(address="local", include_dashboard=False, logging_level=logging.WARNING)
        try:
            quiet = LoggingConfig(log_level="WARNING")
            options = {"host": "127.0.0.1", "port": PORT[profile]}
            serve.start(http_options=options, logging_config=quiet)
            serve.run(build(config), logging_config=quiet)
            # The thinnest client there is: what it takes counts as hops.
            with contextlib.closing(
                http.client.HTTPConnection("127.0.0.1", PORT[profile], timeout=60)
            ) as client:
                while ask(client, "GET", "/ready")[0] != HTTPStatus.OK:
                    time.sleep(0.2)
                times = [one_request(client, number) for number in range(WARM_UP + requests)]
            return times[WARM_UP:]
        finally:
            serve.shutdown()
            ray.shutdown()


def ask(
    client: http.client.HTTPConnection, method: str, path: str, body: bytes | None = None
) -> tuple[int, bytes]:
    client.request(method, path, body)
    response = client.getresponse()
    return response.status, response.read()


def one_request(client: http.client.HTTPConnection, number: int) -> dict[str, float]:
    image = {"type": "image_url", "image_url": {"url": new_picture(number)}}
    body = {
        "messages": [{"role": "user", "content": [image, {"type": "text", "text": "what is it?"}]}],
        "max_tokens": 4,
        "ignore_eos": True,
    }
    content = json.dumps(body).encode()
    before = stage_seconds()
    start = time.perf_counter()
    status, answer = ask(client, "POST", "/v1/chat/completions", content)
    times = {"total": time.perf_counter() - start}
    assert status == HTTPStatus.OK, answer
    after = stage_seconds()
    times |= {part: after[part] - before[part] for part in after}
    times["hops"] = times["total"] - sum(times[part] for part in after)
    return {part: seconds * 1000 for part, seconds in times.items()}


def stage_seconds() -> dict[str, float]:
    """Seconds of work inside each stage since its start."""
    from ray import serve

    def stats(deployment: str) -> dict[str, Any]:
        answer: dict[str, Any] = (
            serve.get_deployment_handle(deployment, "default").stats.remote().result()
        )
        return answer

    return {
        "decode": stats("Preprocessor")["seconds"],
        "encode": stats("Encoder")["seconds"],
        "engine": stats("Generator")["engine_seconds"],
    }


def new_picture(number: int) -> str:
    """A data URL of a JPEG of 640 x 480, about as large as a photograph's (90 kB)."""
    rng = np.random.default_rng(number)
    rough = rng.integers(0, 256, (60, 80, 3), dtype=np.uint8)
    picture = Image.fromarray(rough).resize((640, 480), Image.Resampling.BICUBIC)
    buffer = io.BytesIO()
    picture.save(buffer, "JPEG", quality=90)
    return f"data:image/jpeg;base64,{base64.b64encode(buffer.getvalue()).decode()}"


if __name__ == "__main__":
    main()
