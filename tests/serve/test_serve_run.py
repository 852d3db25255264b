"""`serve run` starts the application. For `serve deploy`, see tests/up/test_dev_cpu.py."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
import ray

from blip2_serve.demo import scenes
from support.images import data_url
from support.server import wait_until

SERVE = Path(sys.executable).with_name("serve")
SCENE = scenes.sample(5_001)
NAME = "by-run"


@pytest.fixture
def delete_afterwards() -> Iterator[None]:
    yield
    ray.serve.delete(NAME)


@pytest.mark.usefixtures("delete_afterwards")
def test_serve_run_starts_the_application_with_arguments(base_url: str) -> None:
    arguments = ["model=demo", "dtype=bfloat16", "max_model_len=128"]
    address = ray.get_runtime_context().gcs_address
    place = [f"--address={address}", f"--name={NAME}", f"--route-prefix=/{NAME}"]
    subprocess.run(
        [SERVE, "run", "blip2_serve.app:build", *arguments, *place, "--non-blocking"],
        check=True,
        timeout=170,
    )
    url = f"{base_url}/{NAME}"
    wait_until(lambda: httpx.get(f"{url}/ready", timeout=30).is_success)
    body = {"image": data_url(SCENE.image)}
    answer = httpx.post(f"{url}/v1/caption", json=body, timeout=60)
    assert answer.json()["data"][0]["caption"] == SCENE.caption
