from __future__ import annotations

import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounter

from blip2_serve.model.checkpoint import open_checkpoint
from blip2_serve.model.processor import ImageProcessor
from blip2_serve.model.vision import ImageEncoder
from support.checkpoints import Recipe, write_checkpoint


@pytest.fixture
def encoder(tmp_path: Path) -> Iterator[ImageEncoder]:
    checkpoint = open_checkpoint(str(write_checkpoint(tmp_path, Recipe("seeing", seed=1))))
    processor = ImageProcessor.load(tmp_path)
    yield ImageEncoder.load(checkpoint, processor, torch.device("cpu"), torch.float32)
    torch._dynamo.reset()


def pixels(images: int) -> Tensor:
    generator = torch.Generator().manual_seed(images)
    return torch.randint(0, 256, (images, 3, 56, 56), dtype=torch.uint8, generator=generator)


def test_each_kind_of_layer_is_compiled_twice_whatever_the_batch(encoder: ImageEncoder) -> None:
    expected = {images: encoder(pixels(images)) for images in (1, 2, 3, 5)}
    compiler = CompileCounter()

    encoder.compile_layers(3, backend=compiler)

    # A ViT layer, a Q-Former layer with and one without cross attention; one image, or several.
    assert compiler.frame_count == 3 * 2
    for images, prefixes in expected.items():
        torch.testing.assert_close(encoder(pixels(images)), prefixes)
    assert compiler.frame_count == 3 * 2


def test_an_encoder_that_cannot_be_compiled_runs_as_it_is(
    encoder: ImageEncoder, caplog: pytest.LogCaptureFixture
) -> None:
    expected = encoder(pixels(2))
    layers = [*encoder.vision_model.encoder.layers, *encoder.qformer.encoder.layer]

    def no_compiler(*_: Any) -> Any:
        raise RuntimeError("no Triton here")

    with caplog.at_level(logging.WARNING):
        encoder.compile_layers(2, backend=no_compiler)

    assert "the vision model cannot be compiled" in caplog.text
    assert [*encoder.vision_model.encoder.layers, *encoder.qformer.encoder.layer] == layers
    torch.testing.assert_close(encoder(pixels(2)), expected)
