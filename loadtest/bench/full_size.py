"""Memory of a checkpoint of the real size: load it from float32 shards, answer one caption.

    python loadtest/bench/full_size.py FOLDER [--dtype bfloat16]

Writes a checkpoint of `Salesforce/blip2-opt-2.7b-coco`'s shape with random weights into FOLDER
(15 GB, kept for the next run; with the shipped tokenizer, whose ids are a part of its vocabulary),
serves it, captions the bundled picture over HTTP, and prints for both stages the bytes of their
tensors, the growth of their anonymous memory since before loading, the ratio, and how long it took.
"""

from __future__ import annotations

import argparse
import json
import logging
import shutil
import sys
import time
from pathlib import Path

import httpx
import ray
import torch
from ray import serve
from safetensors.torch import save_file
from transformers import Blip2ForConditionalGeneration

sys.path.insert(0, str(Path(__file__).parents[1]))

from bench.shapes import real_shape
from blip2_serve.app import build
from blip2_serve.client import data_url
from blip2_serve.config import AppConfig
from blip2_serve.model.source import DEMO_FOLDER, DEMO_PICTURE

PORT = 8766
SHARD_BYTES = 2 << 30


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--dtype", default="bfloat16")
    args = parser.parse_args()
    if not (args.folder / "model.safetensors.index.json").exists():
        write_checkpoint(args.folder)

    ray.init(address="local", include_dashboard=False, logging_level=logging.WARNING)
    serve.start(http_options={"port": PORT})
    started = time.perf_counter()
    try:
        config = AppConfig(model=str(args.folder), dtype=args.dtype, device="cpu")
        serve.run(build(config))
        url = f"http://127.0.0.1:{PORT}"
        while httpx.get(f"{url}/ready", timeout=60, trust_env=False).is_error:
            time.sleep(0.5)
        print(f"ready after {time.perf_counter() - started:.0f} s")
        before = time.perf_counter()
        body = {"image": data_url(DEMO_PICTURE), "max_tokens": 16, "ignore_eos": True}
        answer = httpx.post(f"{url}/v1/generate", json=body, timeout=600, trust_env=False)
        answer.raise_for_status()
        seconds = time.perf_counter() - before
        print(f"one caption of 16 tokens: {seconds:.1f} s, {answer.json()['usage']}")
        for name in ("Encoder", "Generator"):
            stats = serve.get_deployment_handle(name, "default").stats.remote().result()
            tensors, grown = stats["tensor_bytes"], stats["rss_anon_growth"]
            print(
                f"{name}: tensors {tensors / 1e9:.2f} GB, anonymous memory grew by "
                f"{grown / 1e9:.2f} GB ({grown / tensors:.3f} x) in {stats['load_seconds']:.0f} s"
            )
    finally:
        serve.shutdown()
        ray.shutdown()


def write_checkpoint(folder: Path) -> None:
    """Random float32 weights in shards, tensor by tensor: the model is never whole in memory."""
    folder.mkdir(parents=True, exist_ok=True)
    config = real_shape()
    with torch.device("meta"):
        shapes = {
            name: tensor.shape
            for name, tensor in Blip2ForConditionalGeneration(config).named_parameters()
        }
    shard: dict[str, torch.Tensor] = {}
    weight_map: dict[str, str] = {}
    size = number = 0
    for name, shape in shapes.items():
        ones = "norm" in name.lower() and name.endswith("weight")
        shard[name] = torch.ones(shape) if ones else torch.empty(shape).normal_(std=0.02)
        size += shard[name].numel() * 4
        if size >= SHARD_BYTES or name == list(shapes)[-1]:
            number += 1
            file = f"model-{number:05}.safetensors"
            save_file(shard, folder / file)
            weight_map |= dict.fromkeys(shard, file)
            shard, size = {}, 0
            print(f"wrote {file}")
    index = {"metadata": {}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    config.save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json", "processor_config.json"):
        shutil.copy(DEMO_FOLDER / name, folder)
    processor = json.loads((folder / "processor_config.json").read_text())
    processor["image_processor"]["size"] = {"height": 364, "width": 364}
    (folder / "processor_config.json").write_text(json.dumps(processor))


if __name__ == "__main__":
    main()
