from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from blip2_serve.compute.base import Device
from blip2_serve.compute.cuda.graphs import EncoderGraphs
from blip2_serve.model.vision import ImageEncoder
from support.capturing import run_again
from support.checkpoints import Recipe, load_encoder, write_checkpoint


@pytest.fixture
def encoder(tmp_path: Path) -> ImageEncoder:
    return load_encoder(write_checkpoint(tmp_path, Recipe("vision", seed=1)))


def pixels(images: int) -> Tensor:
    generator = torch.Generator().manual_seed(images)
    return torch.randint(0, 256, (images, 3, 56, 56), dtype=torch.uint8, generator=generator)


def captured(encoder: ImageEncoder, max_batch_size: int) -> EncoderGraphs:
    return EncoderGraphs(encoder, 56, Device(torch.device("cpu")), max_batch_size, run_again)


def test_batches_of_captured_and_other_sizes_match_the_model(
    encoder: ImageEncoder,
) -> None:
    graphs = captured(encoder, 3)
    for images in (1, 2, 3, 5):
        features = encoder(pixels(images))
        torch.testing.assert_close(graphs.run(pixels(images)), features, atol=0, rtol=0)


def test_a_batch_does_not_overwrite_the_previous_features(encoder: ImageEncoder) -> None:
    graphs = captured(encoder, 2)
    first = graphs.run(pixels(2))
    before = first.clone()
    graphs.run(pixels(2).flip(0))
    torch.testing.assert_close(first, before, atol=0, rtol=0)
