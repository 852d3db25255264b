"""The three ways to start the application: `blip2-serve up`, `serve run`, `serve deploy`."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import httpx
import psutil
import pytest
import ray
import yaml

from blip2_serve.demo import scenes
from support.server import App, data_url, free_port, start_app, wait_until

BIN = Path(sys.executable).parent
SCENE = scenes.sample(5_001)
LIGHT = {stage: {"num_cpus": 0} for stage in ("ingress", "preprocessor", "encoder", "generator")}


def caption(url: str) -> str:
    response = httpx.post(f"{url}/v1/caption", json={"image": data_url(SCENE.image)}, timeout=60)
    assert response.status_code == httpx.codes.OK, response.text
    text: str = response.json()["data"][0]["caption"]
    return text


def is_ready(url: str) -> bool:
    try:
        return httpx.get(f"{url}/ready", timeout=30).status_code == httpx.codes.OK
    except httpx.TransportError:
        return False


@pytest.mark.parametrize("stop", [signal.SIGINT, signal.SIGTERM], ids=["Ctrl-C", "SIGTERM"])
def test_up_captions_the_bundled_picture_serves_and_leaves_no_process_behind(
    stop: signal.Signals, tmp_path: Path
) -> None:
    port = free_port()
    log = (tmp_path / "log").open("w+")
    # A session of its own, as a terminal gives it; Ray finds no other cluster through it.
    environment = {k: v for k, v in os.environ.items() if not k.startswith("RAY_")}
    server = subprocess.Popen(
        [BIN / "blip2-serve", "up", "--port", str(port)],
        stdout=log,
        stderr=subprocess.STDOUT,
        env=environment,
        start_new_session=True,
    )
    try:
        wait_until(lambda: "Ctrl-C" in Path(log.name).read_text() or server.poll() is not None)
        printed = Path(log.name).read_text()
        url = f"http://127.0.0.1:{port}"
        assert f"ready at {url}" in printed
        assert "a large red square at the top left" in printed
        assert f"{url}/v1/caption" in printed
        assert caption(url) == SCENE.caption
        family = psutil.Process(server.pid).children(recursive=True)
        assert family
        server.send_signal(stop)
        assert server.wait(timeout=60) == 0
        wait_until(lambda: not any(_is_alive(process) for process in family), within_s=30)
        assert "Traceback" not in Path(log.name).read_text()
    finally:
        if server.poll() is None:
            server.kill()
        print(Path(log.name).read_text())
        log.close()


def _is_alive(process: psutil.Process) -> bool:
    return process.is_running() and process.status() != psutil.STATUS_ZOMBIE


@pytest.fixture
def gone_afterwards() -> Iterator[None]:
    yield
    for name in ("by-run", "by-deploy"):
        ray.serve.delete(name)


@pytest.mark.usefixtures("gone_afterwards")
def test_serve_run_takes_the_builder_and_its_arguments(base_url: str) -> None:
    address = ray.get_runtime_context().gcs_address
    subprocess.run(
        [
            BIN / "serve",
            "run",
            "blip2_serve.app:build",
            "model=demo",
            "dtype=bfloat16",
            "max_model_len=128",
            f"--address={address}",
            "--name=by-run",
            "--route-prefix=/by-run",
            "--non-blocking",
        ],
        check=True,
        timeout=170,
    )
    url = f"{base_url}/by-run"
    wait_until(lambda: is_ready(url))
    assert caption(url) == SCENE.caption


@pytest.mark.usefixtures("gone_afterwards")
def test_serve_deploy_takes_a_config_file(
    base_url: str, dashboard_port: int, tmp_path: Path
) -> None:
    config = {
        "applications": [
            {
                "name": "by-deploy",
                "route_prefix": "/by-deploy",
                "import_path": "blip2_serve.app:build",
                "args": {"model": "demo", **LIGHT},
            }
        ]
    }
    file = tmp_path / "serve.yaml"
    file.write_text(yaml.safe_dump(config))
    address = f"http://127.0.0.1:{dashboard_port}"
    subprocess.run([BIN / "serve", "deploy", file, "--address", address], check=True, timeout=120)
    url = f"{base_url}/by-deploy"
    wait_until(lambda: is_ready(url))
    assert caption(url) == SCENE.caption


def test_two_replicas_of_a_stage_share_its_work(base_url: str) -> None:
    app: App = start_app(base_url, "two", {"preprocessor": {"num_replicas": 2}})
    try:
        assert caption(app.url) == SCENE.caption
    finally:
        ray.serve.delete(app.name)
