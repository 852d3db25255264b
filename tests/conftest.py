"""One Ray with Serve for the whole session; applications come and go on it."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator

import pytest
import ray
import torch
from ray import serve
from ray.serve.schema import LoggingConfig

import support.device  # noqa: F401 (before anybody imports Triton)
from support.server import App, free_port, start_app

# One thread each: tests compare results, and several torch processes share two cores.
os.environ.setdefault("OMP_NUM_THREADS", "1")
torch.set_num_threads(1)


@pytest.fixture(scope="session")
def dashboard_port() -> int:
    return free_port()


@pytest.fixture(scope="session")
def base_url(dashboard_port: int) -> Iterator[str]:
    """Where Serve listens."""
    os.environ["RAY_AUTH_MODE"] = "disabled"  # the dashboard is asked without a token
    os.environ["RAY_SERVE_PROXY_READY_CHECK_TIMEOUT_S"] = "60"  # two busy cores
    ray.init(
        address="local",
        include_dashboard=True,
        dashboard_port=dashboard_port,
        logging_level=logging.WARNING,
    )
    port = free_port()
    serve.start(
        http_options={"host": "127.0.0.1", "port": port},
        logging_config=LoggingConfig(log_level="WARNING"),
    )
    yield f"http://127.0.0.1:{port}"
    serve.shutdown()
    ray.shutdown()


@pytest.fixture(scope="session")
def demo(base_url: str) -> App:
    """The shipped checkpoint, in float32."""
    return start_app(base_url, "demo", {"dtype": "float32"})
