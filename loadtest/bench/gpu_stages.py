"""For `gpu.py`: what the device reaches, and how long each stage takes."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import zip_longest
from random import Random

import torch
from torch import Tensor

from blip2_serve.compute.runner import Runner
from blip2_serve.engine.engine import Engine
from loadtest.bench.gpu_model import (
    Models,
    add,
    decoder_flops,
    encoder_flops,
    make_engine,
    random_pixels,
    step_bytes,
)

ROUNDS = 5
SAMPLED = {"temperature": 0.7, "top_p": 0.9}


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def milliseconds(call: Callable[[], object], device: torch.device, rounds: int = ROUNDS) -> float:
    """The median of `rounds` synchronized calls, after one to warm up."""
    call()
    times = []
    for _ in range(rounds):
        synchronize(device)
        start = time.perf_counter()
        call()
        synchronize(device)
        times.append(1000 * (time.perf_counter() - start))
    return statistics.median(times)


def measure_rates(device: torch.device, dtype: torch.dtype) -> dict[str, float]:
    """Bytes per second (read and written) and operations per second that the device reaches."""
    gpu = device.type == "cuda"
    source = torch.randn((1 << 30 if gpu else 1 << 25), device=device)
    target = torch.empty_like(source)
    copying = milliseconds(lambda: target.copy_(source), device, 20)
    size = 8192 if gpu else 1024
    a, b = (torch.randn((size, size), dtype=dtype, device=device) for _ in range(2))

    def multiply() -> None:
        for _ in range(10):
            torch.mm(a, b)

    multiplying = milliseconds(multiply, device) / 10
    return {
        "bytes": 2000 * source.numel() * source.element_size() / copying,
        "flops": 2000 * size**3 / multiplying,
    }


# (name, milliseconds, floating-point operations, bytes)
Measured = tuple[str, float, float, float]


def measure_stages(models: Models, batches: list[int], new_tokens: int) -> Iterator[Measured]:
    """Times encoder, prompts and decode steps at each batch, and steps of longer sequences."""
    config, device = models.reference.config, models.encoder.query_tokens.device
    length, element = len(models.prompt), models.decoder.embed_tokens.weight.element_size()
    weights = sum(p.numel() for p in models.encoder.parameters()) * element
    for batch in sorted({*batches, 2, 4}):
        pixels = random_pixels(models, batch)
        ms = milliseconds(lambda: models.encode(pixels), device)  # noqa: B023 (called here)
        yield f"ViT and Q-Former, {batch} images", ms, batch * encoder_flops(config), weights
    short = length + new_tokens  # halfway through the answers that are timed
    long = min(400, config.text_config.max_position_embeddings // 4)
    for batch in batches:
        longest = max(short + new_tokens, long)
        engine = make_engine(models, batch, longest)
        runner = Runner(
            models.decoder, models.device, batch * longest, max_num_seqs=batch, max_len=longest
        )
        features = models.encode(random_pixels(models, batch))
        prompts, steps = decode_times(models, engine, features, 2 * new_tokens)
        _, sampled = decode_times(models, engine, features, 2 * new_tokens, **SAMPLED)
        flops = decoder_flops(config, batch * length, batch)
        yield f"prompts, {batch} of {length}", prompts, flops, step_bytes(models.decoder, 0, 0)
        flops = decoder_flops(config, batch, batch)
        moved = step_bytes(models.decoder, batch, short)
        yield f"decode step of {batch}, by the engine", steps, flops, moved
        yield f"decode step of {batch}, sampled", sampled, flops, moved
        for tokens in (short, long):
            inputs = decode_inputs(batch, tokens)
            ms = milliseconds(lambda: runner.decode(inputs), device, 50)  # noqa: B023
            moved = step_bytes(models.decoder, batch, tokens)
            yield f"decode step of {batch} at {tokens} tokens", ms, flops, moved

    yield mixed_prompts(models, max(batches))


def mixed_prompts(models: Models, batch: int) -> Measured:
    """Times a step with prompts of many lengths."""
    random = Random(0)
    lengths = [random.randrange(1, 60) for _ in range(batch)]
    longer = [[random.randrange(4, 30) for _ in range(length)] for length in lengths]
    tokens = batch * len(models.prompt) + sum(lengths)
    engine = make_engine(models, batch, len(models.prompt) + 60)
    features = models.encode(random_pixels(models, batch))
    prompts, _ = decode_times(models, engine, features, 1, longer)
    flops = decoder_flops(models.reference.config, tokens, batch)
    return f"prompts, {batch} of {tokens} in all", prompts, flops, step_bytes(models.decoder, 0, 0)


def decode_inputs(batch: int, tokens: int) -> Tensor:
    """Inputs of `Runner.decode`: sequences of `tokens` tokens, each with KV slots of its own."""
    slots = 1 + torch.randperm(batch * tokens).view(batch, tokens)
    own = torch.tensor([[0, tokens - 1]]).expand(batch, 2)
    return torch.cat([own, slots], 1)


def decode_times(
    models: Models,
    engine: Engine,
    features: Tensor,
    new_tokens: int,
    longer: Sequence[Sequence[int]] = (),
    **sampling: float,
) -> tuple[float, float]:
    """Median milliseconds until all prompts have their first token, and from token to token.

    `longer` has what follows each image's prompt.
    """
    prompts, steps = [], []
    for _ in range(ROUNDS):
        for image, more in zip_longest(features, longer, fillvalue=()):
            add(models, engine, image, new_tokens, more, **sampling)
        before, first = time.perf_counter(), True
        while engine.has_work:
            if not engine.step().events:
                continue  # only launched: its tokens are not on the CPU yet
            now = time.perf_counter()
            (prompts if first else steps).append(1000 * (now - before))
            before, first = now, False
    return statistics.median(prompts), statistics.median(steps or [math.nan])


def profile(models: Models, batch: int, new_tokens: int) -> None:
    """Lists the kernels of an image, of a prefill and of decode steps, by time."""
    features = models.encode(random_pixels(models, batch))
    one = random_pixels(models, 1)
    _kernels("one image", lambda: models.encode(one))
    for count in (1, batch):
        engine = make_engine(models, count, len(models.prompt) + new_tokens)

        def answer(engine: Engine, count: int, tokens: int) -> None:
            for image in features[:count]:
                add(models, engine, image, tokens)
            while engine.has_work:
                engine.step()

        _kernels(f"prefill of {count}", partial(answer, engine, count, 1))
        _kernels(f"prefill and 8 decode steps of {count}", partial(answer, engine, count, 9))


def _kernels(name: str, call: Callable[[], object], longest: int = 12) -> None:
    call()
    with torch.profiler.profile() as profiler:
        call()
        synchronize(torch.device("cuda"))
    on_gpu = [e for e in profiler.key_averages() if e.device_type.name == "CUDA"]
    on_gpu.sort(key=lambda e: -e.self_device_time_total)
    total = sum(e.self_device_time_total for e in on_gpu) / 1000
    print(f"\n{name}: {total:.3f} ms of {sum(e.count for e in on_gpu)} kernels")
    for e in on_gpu[:longest]:
        print(f"{e.self_device_time_total / 1000:>9.3f} ms {e.count:>5} x {e.key[:80]}")
