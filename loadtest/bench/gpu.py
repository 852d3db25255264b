"""Every stage on one GPU against its floor, and captions a second against transformers.

    python loadtest/bench/gpu.py [--output gpu.json] [--images 512] [--profile]
    python loadtest/bench/gpu.py --device cpu --shape small    # the same in seconds; no GPU figure

Needs torch and transformers only: it imports `engine/` and `model/` of this package, from the
checkout if blip2_serve is not installed. Weights are random, made on the device, in the shape of
blip2-opt-2.7b-coco at 364 x 364 pixels in bfloat16 (about 35 GB with transformers' copy; some
minutes).

It measures the device first (bytes a second of a large copy, products of large matrices). A stage's
floor is the larger of its bytes and its floating-point operations over these. Then it compares
greedy tokens with transformers': in float32 in a small shape they must be the same, or it
exits with 1; in bfloat16 it prints the share of answers that are.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parents[1]))
sys.path.append(str(Path(__file__).parents[2] / "serve"))

from bench.gpu_model import (
    Models,
    add,
    make_engine,
    make_models,
    random_pixels,
    reference_answers,
)
from bench.gpu_stages import measure_rates, measure_stages, milliseconds, profile
from bench.shapes import real_shape, small_shape
from blip2_serve.compute.cuda.capture import cuda_recorder
from blip2_serve.engine.engine import Engine

NEW_TOKENS = 16
IMAGES = 8  # of a batch, in the end; `encoder.max_batch_size`


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--shape", choices=["full", "small"], help="full on a GPU")
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float16", "float32"])
    parser.add_argument("--images", type=int, help="captioned in the end; 512, or 16 if small")
    parser.add_argument("--running", type=int, help="sequences at once; 128, or 8 if small")
    parser.add_argument("--profile", action="store_true", help="list a decode step's kernels")
    parser.add_argument("--output", type=Path, help="a JSON file")
    args = parser.parse_args()
    device = torch.device(args.device)
    full = (args.shape or ("full" if device.type == "cuda" else "small")) == "full"
    images, running = args.images or (512 if full else 16), args.running or (128 if full else 8)

    print(f"{name_of(device)}, torch {torch.__version__}, transformers {transformers.__version__}")
    if device.type != "cuda":
        print("NOT A GPU: these figures say only that the script runs; GPU figures are missing")
    report: dict[str, Any] = {
        "device": name_of(device),
        "gpu": device.type == "cuda",
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "shape": "full" if full else "small",
        "dtype": args.dtype,
    }
    torch.backends.cudnn.allow_tf32 = False  # float32 means float32 in the comparison
    with torch.inference_mode():
        same = report["float32"] = compare(
            make_models(small_shape(), device, torch.float32), answers=24, batch=8
        )
        print(f"float32, small shape: {same['equal']} of {same['answers']} answers are the same")
        if same["equal"] != same["answers"] or same["different"] == 1:
            print(f"FAILED: float32 must give transformers' tokens, and see the image: {same}")
            return 1

        models = make_models(
            real_shape() if full else small_shape(), device, getattr(torch, args.dtype)
        )
        batches = (1, 8, 64 if full else 8)
        if device.type == "cuda":
            models.encoder.record(IMAGES, cuda_recorder())
        share = report["same_answers"] = compare(models, answers=4 * batches[1], batch=batches[1])
        print(f"{args.dtype}: {share['equal']} of {share['answers']} answers are the same\n")
        report["rates"] = rates = measure_rates(device, models.encoder.dtype)
        print(
            f"measured: {rates['bytes'] / 1e12:.3f} TB/s of a copy, {rates['flops'] / 1e12:.2f} "
            f"TFLOP/s of a product\n\n{'stage':<34}{'ms':>9}{'floor':>9}{'x floor':>9}"
        )
        stages = report["stages"] = []
        for name, ms, flops, moved in measure_stages(models, sorted({*batches}), NEW_TOKENS):
            floor = 1000 * max(flops / rates["flops"], moved / rates["bytes"])
            stages.append({"stage": name, "ms": ms, "floor_ms": floor, "x_floor": ms / floor})
            print(f"{name:<34}{ms:>9.3f}{floor:>9.3f}{ms / floor:>9.2f}", flush=True)
        if args.profile:
            profile(models, NEW_TOKENS)
        report["captions_per_s"] = end_to_end(models, images, running)
    if args.output:
        args.output.write_text(json.dumps(report, indent=1))
    return 0


def name_of(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"


def compare(models: Models, answers: int, batch: int) -> dict[str, int]:
    """Greedy answers of encoder and engine, and of transformers, to the same images."""
    pixels = random_pixels(models, answers)
    engine, _ = make_engine(models.decoder, batch, len(models.prompt) + NEW_TOKENS)
    ours = caption(models, engine, pixels, batch)
    parts = pixels.split(batch)
    theirs = [answer for part in parts for answer in reference_answers(models, part, NEW_TOKENS)]
    return {
        "answers": answers,
        "equal": sum(a == b for a, b in zip(ours, theirs, strict=True)),
        "different": len({*map(tuple, theirs)}),  # among transformers' own
    }


def caption(models: Models, engine: Engine, pixels: Tensor, batch: int) -> list[list[int]]:
    """Encodes `batch` images, answers about them, and goes on to the next."""
    tokens: dict[str, list[int]] = {}
    for part in pixels.split(batch):
        tokens |= {add(models, engine, p, NEW_TOKENS): [] for p in encode(models, part)}
        while engine.has_work:
            step(engine, tokens)
    return [*tokens.values()]


def encode(models: Models, pixels: Tensor) -> Tensor:
    """In batches as the server makes them."""
    return torch.cat([models.encoder(part) for part in pixels.split(IMAGES)])


def caption_overlapped(
    models: Models, engine: Engine, pixels: Tensor, batch: int
) -> list[list[int]]:
    """Encodes the next images in a thread and a stream of its own meanwhile."""
    device = models.encoder.query_tokens.device
    tokens: dict[str, list[int]] = {}

    def encode_apart(part: Tensor) -> Tensor:
        with torch.inference_mode(), own_stream(device, priority=0):
            return encode(models, part)

    with ThreadPoolExecutor(1) as thread, own_stream(device, priority=-1):
        for encoding in [thread.submit(encode_apart, part) for part in pixels.split(batch)]:
            while engine.has_work and not encoding.done():
                step(engine, tokens)
            tokens |= {add(models, engine, p, NEW_TOKENS): [] for p in encoding.result()}
        while engine.has_work:
            step(engine, tokens)
    return [*tokens.values()]


def step(engine: Engine, tokens: dict[str, list[int]]) -> None:
    for name, event in engine.step().events:
        tokens[name] += event.token_ids


@contextmanager
def own_stream(device: torch.device, priority: int) -> Iterator[None]:
    """What is asked for inside may run beside other streams' work; the lower priority goes first.

    All of it is done at the end.
    """
    if device.type != "cuda":
        yield
        return
    stream = torch.cuda.Stream(device, priority=priority)
    stream.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(stream):
        yield
    stream.synchronize()


def end_to_end(models: Models, images: int, running: int) -> dict[str, float]:
    """Captions a second of `NEW_TOKENS` tokens: ours, and transformers' at several batches."""
    engine, _ = make_engine(models.decoder, running, len(models.prompt) + NEW_TOKENS)
    pixels = random_pixels(models, images)
    rates = {}
    print(f"\n{'captions a second, ' + str(NEW_TOKENS) + ' new tokens':<34}")
    for name, run in (("stages in turn", caption), ("stages overlapped", caption_overlapped)):
        run(models, engine, pixels[: 2 * running], running)
        start = time.perf_counter()
        answers = run(models, engine, pixels, running)
        rates[name] = images / (time.perf_counter() - start)
        assert [len(answer) for answer in answers] == [NEW_TOKENS] * images
        print(f"{'ours, ' + name:<34}{rates[name]:>9.1f}", flush=True)
    ours = max(rates.values())
    for batch in sorted({min(batch, images) for batch in (1, 8, 32, 64, 128)}):
        part = pixels[:batch]
        ms = milliseconds(
            lambda: reference_answers(models, part, NEW_TOKENS),  # noqa: B023 (called here)
            models.reference.device,
            2,
        )
        rates[f"transformers, {batch} at once"] = rate = 1000 * batch / ms
        print(f"{f'transformers, {batch} at once':<34}{rate:>9.1f}", flush=True)
    theirs = max(rate for name, rate in rates.items() if name.startswith("transformers"))
    print(f"{ours / theirs:.2f} times transformers' best")
    return rates


if __name__ == "__main__":
    sys.exit(main())
