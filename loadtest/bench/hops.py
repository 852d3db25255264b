"""Measures what the way between processes costs: client time minus the work of the stages.

    python -m loadtest.bench.hops [--requests 60]

Sends chat completions one after another on one connection, each with a new JPEG of 640 x 480, to
the shipped checkpoint on a local Ray: behind Ray Serve's own proxy, then behind HAProxy as with
`blip2-serve up`. Prints p50 and p90 in milliseconds of `total` (at the client), `decode`, `encode`
and `engine` (inside the stages), and `hops`, the rest: HTTP, JSON, base64, validation, and the way
from process to process.
"""

from __future__ import annotations

import contextlib
import http.client
import json
import logging
import os
import subprocess
import sys
import tempfile
import time
from http import HTTPStatus
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np

from blip2_serve import environment, haproxy
from blip2_serve.config import AppConfig
from loadtest.bench import script
from loadtest.bench.servers import free_port
from loadtest.bench.workload import Request, data_url, picture
from loadtest.stats import percentiles

PROFILES = ("serve", "haproxy")
PARTS = ("total", "decode", "encode", "engine", "hops")
WARM_UP = 10

Times = list[dict[str, float]]  # milliseconds by part


def main() -> None:
    parser = script.parser(__doc__)
    parser.add_argument("--requests", type=int, default=60)
    parser.add_argument("--profile", choices=PROFILES, help="measure only this one, print JSON")
    args = parser.parse_args()
    if args.profile:
        print(json.dumps(measure(args.profile, args.requests)))
        return
    print(f"{'':16}" + "".join(f"{part:>10}" for part in PARTS))
    for profile in PROFILES:
        # In a process of its own, because Ray reads its environment when it is imported.
        command = [sys.executable, "-m", "loadtest.bench.hops", "--profile", profile]
        command += ["--requests", str(args.requests)]
        done = subprocess.run(command, stdout=subprocess.PIPE, check=True)
        times: Times = json.loads(done.stdout.splitlines()[-1])
        for percent in (50, 90):
            row = (percentiles([t[part] for t in times], percent)[0] for part in PARTS)
            name = f"{profile} p{percent}"
            print(f"{name:16}" + "".join(f"{ms:10.1f}" for ms in row), flush=True)


def measure(profile: str, requests: int) -> Times:
    """Starts the application and measures each request."""
    config = AppConfig()
    with contextlib.ExitStack() as stack:
        stack.enter_context(patch.dict(os.environ, environment.short_hops(config)))
        if profile == "haproxy":
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="blip2-")))
            stack.enter_context(haproxy.profile("127.0.0.1", folder))
        # The handles in this process have no event loop and need a router of their own; the
        # replicas' handles must not get one.
        with patch.dict(os.environ, {"RAY_SERVE_RUN_ROUTER_IN_SEPARATE_LOOP": "1"}):
            import ray
            from ray import serve
            from ray.serve.schema import LoggingConfig

            from blip2_serve.app import build

        ray.init(address="local", include_dashboard=False, logging_level=logging.WARNING)
        try:
            quiet = LoggingConfig(log_level="WARNING")
            port = free_port()
            serve.start(http_options={"host": "127.0.0.1", "port": port}, logging_config=quiet)
            serve.run(build(config), logging_config=quiet)
            # The thinnest client there is, because its own time counts as hops.
            connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
            with contextlib.closing(connection) as client:
                while ask(client, "GET", "/ready")[0] != HTTPStatus.OK:
                    time.sleep(0.2)
                return [one_request(client, n) for n in range(WARM_UP + requests)][WARM_UP:]
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
    """Milliseconds by part."""
    shown = data_url(picture(np.random.default_rng(number)))
    request = Request("what is it?", shown, max_tokens=4)
    body = json.dumps(request.body("demo", stream=False)).encode()
    before = stage_seconds()
    start = time.perf_counter()
    status, answer = ask(client, "POST", "/v1/chat/completions", body)
    total = time.perf_counter() - start
    assert status == HTTPStatus.OK, answer
    after = stage_seconds()
    work = {part: after[part] - before[part] for part in after}
    times = {"total": total, **work, "hops": total - sum(work.values())}
    return {part: 1000 * seconds for part, seconds in times.items()}


def stage_seconds() -> dict[str, float]:
    """Seconds of work in each stage since its start."""
    from ray import serve

    def stats(deployment: str) -> Any:
        return serve.get_deployment_handle(deployment, "default").stats.remote().result()

    return {
        "decode": stats("Preprocessor")["seconds"],
        "encode": stats("Encoder")["seconds"],
        "engine": stats("Generator")["engine_seconds"],
    }


if __name__ == "__main__":
    main()
