"""An encoder that can no longer compute fails its health check, so that Serve replaces it."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from blip2_serve.config import AppConfig
from blip2_serve.errors import Blip2ServeError, TimedOut, WrongCheckpoint
from blip2_serve.stages.encoder import Encoder
from blip2_serve.types import Call, ImageFeatures
from support.replicas import replica


async def test_an_encoder_is_unhealthy_only_while_batches_fail() -> None:
    encoder, loaded = replica(Encoder, AppConfig(dtype="float32"), "cpu")
    await loaded
    await encoder.check_health()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(type(encoder._batching), "stalled_s", 61.0)
        with pytest.raises(RuntimeError, match="no progress for 61 s"):
            await encoder.check_health()
    works, pixels = encoder._model._run, encoder._model.blank

    def is_gone(_: Any) -> None:
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    encoder._model._run = is_gone
    with pytest.raises(RuntimeError, match="CUDA error"):
        await encoder.encode(pixels, "digest")
    for _ in range(2):  # Serve checks several times before it replaces a replica
        with pytest.raises(RuntimeError, match="CUDA error"):
            await encoder.check_health()

    encoder._model._run = works  # as if only that batch had failed
    await encoder.check_health()
    assert encoder._batching.failure is None


async def test_an_image_without_numbers_fails_alone() -> None:
    encoder, loaded = replica(Encoder, AppConfig(dtype="float32"), "cpu")
    await loaded
    works = encoder._model._run
    dark = encoder._model.blank
    light = replace(dark, values=np.full_like(dark.values, 255))

    def loses_dark_ones(batch: torch.Tensor) -> torch.Tensor:
        features: torch.Tensor = works(batch).clone()
        features[batch.flatten(1).amax(1) == 0, 3, 5] = torch.nan
        return features

    encoder._model._run = loses_dark_ones
    calls = [encoder.encode(pixels, "digest") for pixels in (dark, light, dark)]
    outcomes = await asyncio.gather(*calls, return_exceptions=True)
    assert [type(outcome) for outcome in outcomes] == [
        Blip2ServeError,
        ImageFeatures,
        Blip2ServeError,
    ]
    await encoder.encode(light, "digest")
    for _ in range(3):
        await encoder.check_health()
        with pytest.raises(Blip2ServeError, match="no finite numbers"):
            await encoder.encode(dark, "digest")
    with pytest.raises(Blip2ServeError, match="no finite numbers"):
        await encoder.check_health()  # of a blank image, too
    encoder._model._run = works
    await encoder.check_health()
    assert encoder._model.without_numbers == 0


async def test_an_image_whose_time_is_over_is_not_encoded() -> None:
    encoder, loaded = replica(Encoder, AppConfig(dtype="float32"), "cpu")
    await loaded
    pixels = encoder._model.blank
    with pytest.raises(TimedOut):
        await encoder.encode(pixels, "digest", call=Call("a", 0.0))
    for call in (None, Call("a", None), Call("a", 3600.0)):
        assert (await encoder.encode(pixels, "digest", call=call)).digest == "digest"


async def test_an_image_prepared_for_another_checkpoint_is_not_encoded() -> None:
    encoder, loaded = replica(Encoder, AppConfig(dtype="float32"), "cpu")
    await loaded
    right = encoder._model.blank
    larger = replace(right, values=np.zeros((3, 32, 32), np.uint8))
    for wrong in (larger, replace(right, resample=right.resample + 1)):
        with pytest.raises(WrongCheckpoint):
            await encoder.encode(wrong, "digest")
