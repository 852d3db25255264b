"""The GPU benchmark runs, compares and reports on a CPU, where its figures mean nothing."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.long

ROOT = Path(__file__).parents[2]

# Runs a module as `python -m` does, then prints which packages it has loaded.
RUN = """
import runpy, sys
try:
    runpy.run_module("loadtest.bench.gpu", run_name="__main__", alter_sys=True)
except SystemExit as end:
    assert not end.code, end.code
print("loaded", sorted({name.partition(".")[0] for name in sys.modules}))
"""


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, dict[str, object]]:
    """Its output and its report."""
    output = tmp_path_factory.mktemp("gpu") / "report.json"
    options = ["--device", "cpu", "--shape", "small", "--images", "9", "--running", "4"]
    done = subprocess.run(
        [sys.executable, "-c", RUN, *options, "--output", output],
        capture_output=True,
        text=True,
        cwd=ROOT,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout, json.loads(output.read_text())


def test_it_warns_that_a_cpu_is_not_a_gpu(run: tuple[str, dict[str, object]]) -> None:
    printed, report = run
    assert "NOT A GPU" in printed
    assert report["gpu"] is False


def test_it_gives_transformers_tokens_in_float32(run: tuple[str, dict[str, object]]) -> None:
    printed, report = run
    assert "float32, small shape: 24 of 24 answers are the same" in printed
    assert report["float32"]["different"] > 1


def test_it_reports_every_stage_against_its_floor(run: tuple[str, dict[str, object]]) -> None:
    _, report = run
    names = [stage["stage"] for stage in report["stages"]]
    assert names == [
        *(f"ViT and Q-Former, {images} images" for images in (1, 2, 4, 8)),
        "prompts, 1 of 12",
        "decode step of 1, by the engine",
        "decode step of 1, sampled",
        "decode step of 1 at 28 tokens",
        "decode step of 1 at 64 tokens",
        "prompts, 8 of 12",
        "decode step of 8, by the engine",
        "decode step of 8, sampled",
        "decode step of 8 at 28 tokens",
        "decode step of 8 at 64 tokens",
        "prompts, 8 of 362 in all",
    ]
    assert all(stage["ms"] > stage["floor_ms"] > 0 for stage in report["stages"])
    assert all(rate > 0 for rate in report["captions_per_s"].values())


def test_it_needs_neither_ray_nor_pydantic_nor_fastapi(
    run: tuple[str, dict[str, object]],
) -> None:
    loaded = run[0].splitlines()[-1]
    assert loaded.startswith("loaded")
    assert "'blip2_serve'" in loaded
    assert not [name for name in ("ray", "pydantic", "fastapi") if f"'{name}'" in loaded]
