"""A Ray cluster with Serve that all tests of this folder deploy their applications on."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest
import ray
from ray import serve
from ray.serve.schema import LoggingConfig

from support.checkpoints import Recipe, write_checkpoint
from support.oracle import Oracle
from support.server import App, free_port, start_app

# What is to be stopped once no test of this folder is left: idle replicas take half a core from the
# tests that this process runs afterwards.
RUNNING = ExitStack()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_teardown(item: pytest.Item, nextitem: pytest.Item | None) -> Iterator[None]:
    yield
    if nextitem is None or nextitem.path.parent != item.path.parent:
        RUNNING.close()


@pytest.fixture(scope="session")
def base_url() -> str:
    """Starts Serve and returns its URL."""
    os.environ["RAY_AUTH_MODE"] = "disabled"
    os.environ |= {"RAY_worker_niceness": "0"}  # as `up` has it; other tests run beside
    # Replicas find the stages of `support.planted` there.
    path = [str(Path(__file__).parents[1]), os.environ.get("PYTHONPATH", "")]
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, path))
    os.environ["PYTHONOPTIMIZE"] = "1"  # nothing may depend on an assert: CVE-2026-41523
    os.environ["RAY_SERVE_PROXY_READY_CHECK_TIMEOUT_S"] = "60"  # two busy cores
    os.environ["RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH"] = "blip2_serve.http.proxy.middlewares"
    ray.init(address="local", include_dashboard=False, logging_level=logging.WARNING)
    RUNNING.callback(ray.shutdown)
    port = free_port()
    serve.start(
        http_options={"host": "127.0.0.1", "port": port},
        logging_config=LoggingConfig(log_level="WARNING"),
    )
    RUNNING.callback(serve.shutdown)
    return f"http://127.0.0.1:{port}"


@pytest.fixture(scope="session")
def demo(base_url: str) -> App:
    """The shipped checkpoint, in float32."""
    return start_app(base_url, "demo", {"dtype": "float32"})


@pytest.fixture(scope="session")
def random_model(base_url: str, tmp_path_factory: pytest.TempPathFactory) -> tuple[App, Oracle]:
    """A random checkpoint, which answers differently for each image; two replicas per stage."""
    folder = write_checkpoint(tmp_path_factory.mktemp("random"), Recipe("random", seed=1))
    two = {stage: {"num_replicas": 2} for stage in ("preprocessor", "encoder", "generator")}
    app = start_app(base_url, "random", {"model": str(folder), "dtype": "float32", **two})
    return app, Oracle(folder)
