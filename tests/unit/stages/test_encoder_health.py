"""An encoder that can no longer compute fails its health check, so that Serve replaces it."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from blip2_serve.config import AppConfig
from blip2_serve.stages.encoder import Encoder
from support.replicas import replica


async def test_an_encoder_is_unhealthy_only_while_batches_fail() -> None:
    encoder, loaded = replica(Encoder, AppConfig(dtype="float32"), "cpu")
    await loaded
    await encoder.check_health()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(type(encoder._batching), "stalled_s", 61.0)
        with pytest.raises(RuntimeError, match="no progress for 61 s"):
            await encoder.check_health()
    works, pixels = encoder._run, np.zeros((3, 224, 224), np.uint8)

    def is_gone(_: Any) -> None:
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    encoder._run = is_gone
    with pytest.raises(RuntimeError, match="CUDA error"):
        await encoder.encode(pixels, "digest")
    for _ in range(2):  # Serve checks several times before it replaces a replica
        with pytest.raises(RuntimeError, match="CUDA error"):
            await encoder.check_health()

    encoder._run = works  # as if only that batch had failed
    await encoder.check_health()
    assert encoder._batching.failure is None
