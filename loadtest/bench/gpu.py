"""Measures every stage on one GPU against its floor, and captions per second against transformers.

    PYTHONPATH=serve python -m loadtest.bench.gpu [--output gpu.json] [--images 512] [--profile]
    PYTHONPATH=serve python -m loadtest.bench.gpu --device cpu --shape small

The second line only shows, in seconds, that the script runs. It needs torch and transformers, but
neither Ray nor an installed blip2_serve. Weights are random, made on the device in the shape of
blip2-opt-2.7b-coco at 364 x 364 pixels in bfloat16, which takes some minutes, and 35 GB together
with transformers' copy.

A stage's floor is the larger of its bytes and its floating-point operations, each divided by what
the device reaches (bytes per second of a large copy, products of large matrices). Greedy tokens are
compared with transformers': in float32 in the small shape they must be equal, or the script exits
with 1; in --dtype it prints the share of equal answers.
"""

from __future__ import annotations

import argparse
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

from blip2_serve.engine.engine import Engine
from loadtest.bench.gpu_model import (
    Models,
    add,
    make_engine,
    make_models,
    random_pixels,
    reference_answers,
    step,
)
from loadtest.bench.gpu_stages import measure_rates, measure_stages, milliseconds, profile
from loadtest.bench.weights import shape
from loadtest.results import write_json

NEW_TOKENS = 16
IMAGES = 8  # per batch of the encoder, as in the server

Report = dict[str, Any]


def main() -> int:
    args = arguments()
    device = torch.device(args.device)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
    print(f"{name}, torch {torch.__version__}, transformers {transformers.__version__}")
    if device.type != "cuda":
        print("NOT A GPU: the figures only show that the script runs")
    report: Report = {
        "device": name,
        "gpu": device.type == "cuda",
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "shape": args.shape,
        "dtype": args.dtype,
    }
    torch.backends.cudnn.allow_tf32 = False  # the comparison needs true float32
    with torch.inference_mode():
        equal = same_tokens_in_float32(device, report)
        if equal:
            measure(args, device, report)
    if args.output:
        write_json(args.output, report)
    return int(not equal)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--shape", choices=["full", "small"], help="by default full on a GPU")
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float16", "float32"])
    parser.add_argument("--images", type=int, help="to caption; by default 512, or 16 if small")
    parser.add_argument("--running", type=int, help="sequences; by default 128, or 8 if small")
    parser.add_argument("--profile", action="store_true", help="list the kernels of each stage")
    parser.add_argument("--output", type=Path, help="JSON file")
    args = parser.parse_args()
    args.shape = args.shape or ("full" if args.device.startswith("cuda") else "small")
    args.images = args.images or (512 if args.shape == "full" else 16)
    args.running = args.running or (128 if args.shape == "full" else 8)
    return args


def same_tokens_in_float32(device: torch.device, report: Report) -> bool:
    models = make_models(shape("small"), device, torch.float32, IMAGES)
    found = report["float32"] = compare(models, answers=24, batch=8)
    print(f"float32, small shape: {found['equal']} of {found['answers']} answers are the same")
    if found["equal"] == found["answers"] and found["different"] > 1:
        return True
    print(f"FAILED: float32 must give transformers' tokens and depend on the image: {found}")
    return False


def measure(args: argparse.Namespace, device: torch.device, report: Report) -> None:
    """Measures rates, stages and captions per second in the given shape and dtype."""
    full = args.shape == "full"
    models = make_models(shape(args.shape), device, getattr(torch, args.dtype), IMAGES)
    share = report["same_answers"] = compare(models, answers=32, batch=8)
    print(f"{args.dtype}: {share['equal']} of {share['answers']} answers are the same\n")
    report["rates"] = rates = measure_rates(device, models.encoder.dtype)
    print(
        f"measured: {rates['bytes'] / 1e12:.3f} TB/s of a copy, {rates['flops'] / 1e12:.2f} "
        f"TFLOP/s of a product\n\n{'stage':<34}{'ms':>9}{'floor':>9}{'x floor':>9}"
    )
    stages = report["stages"] = []
    for name, ms, flops, moved in measure_stages(
        models, [1, 8, 64] if full else [1, 8], NEW_TOKENS
    ):
        floor = 1000 * max(flops / rates["flops"], moved / rates["bytes"])
        stages.append({"stage": name, "ms": ms, "floor_ms": floor, "x_floor": ms / floor})
        print(f"{name:<34}{ms:>9.3f}{floor:>9.3f}{ms / floor:>9.2f}", flush=True)
    if args.profile and device.type == "cuda":
        profile(models, 64, NEW_TOKENS)
    report["captions_per_s"] = end_to_end(models, args.images, args.running)


def compare(models: Models, answers: int, batch: int) -> dict[str, int]:
    """Counts the greedy answers that equal transformers' for the same images."""
    pixels = random_pixels(models, answers)
    engine = make_engine(models, batch, len(models.prompt) + NEW_TOKENS)
    ours = caption(models, engine, pixels, batch)
    parts = pixels.split(batch)
    theirs = [answer for part in parts for answer in reference_answers(models, part, NEW_TOKENS)]
    return {
        "answers": answers,
        "equal": sum(a == b for a, b in zip(ours, theirs, strict=True)),
        "different": len({*map(tuple, theirs)}),  # among transformers' own
    }


# -- captions per second ---------------------------------------------------------------------------


def caption(models: Models, engine: Engine, pixels: Tensor, batch: int) -> list[list[int]]:
    """Encodes a batch of images, generates its captions, and goes on to the next."""
    tokens: dict[str, list[int]] = {}
    for part in pixels.split(batch):
        tokens |= {add(models, engine, f, NEW_TOKENS): [] for f in encode(models, part)}
        while engine.has_work:
            step(engine, tokens)
    return [*tokens.values()]


def caption_overlapped(
    models: Models, engine: Engine, pixels: Tensor, batch: int
) -> list[list[int]]:
    """Encodes the next images meanwhile, in a thread and a stream of its own."""
    device = models.encoder.query_tokens.device
    tokens: dict[str, list[int]] = {}

    def encode_apart(part: Tensor) -> Tensor:
        with torch.inference_mode(), own_stream(device, priority=0):
            return encode(models, part)

    with ThreadPoolExecutor(1) as thread, own_stream(device, priority=-1):
        for encoding in [thread.submit(encode_apart, part) for part in pixels.split(batch)]:
            while engine.has_work and not encoding.done():
                step(engine, tokens)
            tokens |= {add(models, engine, f, NEW_TOKENS): [] for f in encoding.result()}
        while engine.has_work:
            step(engine, tokens)
    return [*tokens.values()]


def encode(models: Models, pixels: Tensor) -> Tensor:
    """Image features, in batches as the server makes them."""
    return torch.cat([models.encode(part) for part in pixels.split(IMAGES)])


@contextmanager
def own_stream(device: torch.device, priority: int) -> Iterator[None]:
    """Runs the block's kernels in a new stream, and waits for them at its end.

    Kernels of a lower `priority` number go first.
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
    """Captions per second with NEW_TOKENS tokens: ours, and transformers' at several batches."""
    engine = make_engine(models, running, len(models.prompt) + NEW_TOKENS)
    pixels = random_pixels(models, images)
    rates = {}
    print(f"\ncaptions per second, {NEW_TOKENS} new tokens")
    for name, run in (("stages in turn", caption), ("stages overlapped", caption_overlapped)):
        run(models, engine, pixels[: 2 * running], running)
        start = time.perf_counter()
        answers = run(models, engine, pixels, running)
        rates[name] = images / (time.perf_counter() - start)
        assert [len(answer) for answer in answers] == [NEW_TOKENS] * images
        print(f"{'ours, ' + name:<34}{rates[name]:>9.1f}", flush=True)
    ours, theirs = max(rates.values()), 0.0
    for batch in sorted({min(batch, images) for batch in (1, 8, 32, 64, 128)}):
        part = pixels[:batch]
        ms = milliseconds(
            lambda: reference_answers(models, part, NEW_TOKENS),  # noqa: B023 (called here)
            models.reference.device,
            2,
        )
        rates[f"transformers, {batch} at once"] = rate = 1000 * batch / ms
        theirs = max(theirs, rate)
        print(f"{f'transformers, {batch} at once':<34}{rate:>9.1f}", flush=True)
    print(f"{ours / theirs:.2f} times transformers' best")
    return rates


if __name__ == "__main__":
    sys.exit(main())
