from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from blip2_serve.compute.base import Device
from blip2_serve.compute.cuda.graphs import EncoderGraphs
from blip2_serve.model.checkpoint import open_checkpoint
from blip2_serve.model.processor import ImageProcessor
from blip2_serve.model.vision import ImageEncoder
from support.capturing import run_again
from support.checkpoints import Recipe, write_checkpoint


@pytest.fixture
def encoder(tmp_path: Path) -> ImageEncoder:
    checkpoint = open_checkpoint(str(write_checkpoint(tmp_path, Recipe("seeing", seed=1))))
    processor = ImageProcessor.load(tmp_path)
    return ImageEncoder.load(checkpoint, processor, torch.device("cpu"), torch.float32)


def pixels(images: int) -> Tensor:
    generator = torch.Generator().manual_seed(images)
    return torch.randint(0, 256, (images, 3, 56, 56), dtype=torch.uint8, generator=generator)


def captured(encoder: ImageEncoder, max_batch_size: int) -> EncoderGraphs:
    return EncoderGraphs(encoder, Device(torch.device("cpu")), max_batch_size, run_again)


def test_captured_batches_and_larger_ones_give_what_the_model_gives(encoder: ImageEncoder) -> None:
    graphs = captured(encoder, 3)
    for images in (1, 2, 3, 5):
        features = encoder(pixels(images))
        torch.testing.assert_close(graphs.run(pixels(images)), features, atol=0, rtol=0)


def test_the_next_batch_does_not_overwrite_what_the_one_before_gave(encoder: ImageEncoder) -> None:
    graphs = captured(encoder, 2)
    one = graphs.run(pixels(2))
    before = one.clone()
    graphs.run(pixels(2).flip(0))
    torch.testing.assert_close(one, before, atol=0, rtol=0)
