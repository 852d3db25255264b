"""Loading half of a checkpoint allocates only its tensors, in the requested dtype."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Literal

import pytest

from support.checkpoints import Recipe, write_checkpoint

ALLOWED = 1.25

# Runs in its own process: memory that other tests have freed would hide the growth.
SCRIPT = """
import json, sys, torch
from blip2_serve import machine
from blip2_serve.model.checkpoint import open_checkpoint
from blip2_serve.model.decoder import OptDecoder
from blip2_serve.model.processor import ImageProcessor
from blip2_serve.model.vision import ImageEncoder

half, folder = sys.argv[1:]
checkpoint, cpu = open_checkpoint(folder), torch.device("cpu")
torch.zeros(8, 8).bfloat16() @ torch.zeros(8, 8).bfloat16()
before = machine.anonymous_memory()
if half == "vision":
    processor = ImageProcessor.load(checkpoint.folder)
    model = ImageEncoder.load(checkpoint, processor, cpu, torch.bfloat16)
else:
    model = OptDecoder.load(checkpoint, cpu, torch.bfloat16)
owned = sum(p.numel() * p.element_size() for p in model.parameters())
print(json.dumps({"grown": machine.anonymous_memory() - before, "owned": owned}))
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("half", "layout"),
    [
        pytest.param("vision", "sharded", id="vision, safetensors shards"),
        pytest.param("language", "bin", id="language, .bin shards"),
    ],
)
def test_loading_float32_shards_as_bfloat16_allocates_only_the_tensors(
    half: str, layout: Literal["sharded", "bin"], tmp_path: Path
) -> None:
    recipe = Recipe(
        "large",
        seed=6,
        vision_width=768,
        vision_layers=5,
        width=1024,
        layers=3,
        layout=layout,
        shard_size="64MB",
    )
    folder = write_checkpoint(tmp_path, recipe)
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, half, folder], check=True, capture_output=True, text=True
    )
    sizes = json.loads(done.stdout.splitlines()[-1])
    assert sizes["owned"] > 25e6
    assert 0.9 * sizes["owned"] < sizes["grown"] <= ALLOWED * sizes["owned"]
