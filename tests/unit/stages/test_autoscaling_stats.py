"""What the replicas of each stage report for autoscaling, without a cluster."""

from __future__ import annotations

import asyncio
from pathlib import Path

import blip2_serve
from blip2_serve.config import AppConfig
from blip2_serve.stages.encoder import Encoder
from blip2_serve.stages.generator import Generator
from blip2_serve.stages.preprocessor import Preprocessor
from blip2_serve.types import ImageFeatures, Pixels, SamplingParams
from support.replicas import replica

CONFIG = AppConfig.model_validate({"dtype": "float32"})
PICTURE = Path(blip2_serve.__file__).parent / "demo" / "picture.png"


def assert_reported(stats: dict[str, float], *, of_an_engine: bool = False) -> None:
    engine = {"occupancy", "step_s", "fixed_step_s"} if of_an_engine else set()
    assert set(stats) == {"finished", "waiting", "capacity", "start_s", "refused"} | engine
    assert all(isinstance(value, int | float) for value in stats.values())
    assert stats["finished"] > 0
    assert stats["capacity"] > 0
    assert stats["start_s"] > 0
    assert stats["waiting"] == 0


async def test_a_preprocessor_reports_images() -> None:
    preprocessor, started = replica(Preprocessor, CONFIG)
    await started
    assert set(await preprocessor.record_autoscaling_stats()) == {
        "finished",
        "waiting",
        "start_s",
        "refused",
    }

    await asyncio.gather(*(preprocessor.pixels(PICTURE.read_bytes()) for _ in range(4)))

    assert_reported(await preprocessor.record_autoscaling_stats())


async def test_an_encoder_reports_images_and_a_generator_requests() -> None:
    preprocessor, started = replica(Preprocessor, CONFIG)
    await started
    pixels: Pixels = await preprocessor.pixels(PICTURE.read_bytes())
    encoder, loaded = replica(Encoder, CONFIG, "cpu")
    await loaded
    features: ImageFeatures = await encoder.encode(pixels, "digest")
    assert_reported(await encoder.record_autoscaling_stats())

    generator, loaded = replica(Generator, CONFIG, "cpu")
    await loaded
    await generator.generate(features, "", SamplingParams(max_tokens=8))
    async for _ in generator.stream(features, "a photo of", SamplingParams(max_tokens=8)):
        pass

    stats = await generator.record_autoscaling_stats()
    assert_reported(stats, of_an_engine=True)
    assert stats["occupancy"] == 0
