"""What an image will cost is guessed from its first bytes, whatever they are."""

from __future__ import annotations

import numpy as np
import pillow_heif
import pytest
from PIL import Image

from blip2_serve.config import PreprocessorConfig
from blip2_serve.model.pictures import cost
from blip2_serve.model.pictures.cost import expected_seconds
from blip2_serve.model.pictures.faults import MAX_PIXELS
from support.images import encode
from support.mutations import mutated, seeds
from support.pictures import exif, jpeg_with, orientation_tag, segment, tiff

WIDTH, HEIGHT = 640, 480
PIXELS = WIDTH * HEIGHT
PICTURE = Image.new("RGB", (WIDTH, HEIGHT), "red")
GREY = np.zeros((HEIGHT, WIDTH), np.uint8)

pillow_heif.register_heif_opener()

FILES = {
    "PNG": encode(PICTURE),
    "GIF": encode(PICTURE, "GIF"),
    "BMP": encode(PICTURE, "BMP"),
    "TIFF": encode(PICTURE, "TIFF"),
    "big-endian TIFF": tiff(GREY, order=">"),
    "WebP": encode(PICTURE, "WEBP"),
    "lossless WebP": encode(PICTURE, "WEBP", lossless=True),
    "WebP with metadata": encode(PICTURE, "WEBP", exif=exif(orientation_tag(6))),
    "AVIF": encode(PICTURE, "AVIF"),
    "HEIC": encode(PICTURE, "HEIF"),
}
JPEG = encode(PICTURE, "JPEG")
JPEGS = {
    "plain": JPEG,
    "progressive": encode(PICTURE, "JPEG", progressive=True),
    "with metadata": jpeg_with(JPEG, *(segment(0xE2, bytes(60_000)) for _ in range(40))),
    "filled up": JPEG[:2] + 10 * b"\xff" + JPEG[2:],
}


@pytest.mark.parametrize("data", FILES.values(), ids=FILES.keys())
def test_pixels_count_in_every_format(data: bytes) -> None:
    assert expected_seconds(data) == pytest.approx(
        PIXELS * cost._PIXEL_S + len(data) * cost._BYTE_S
    )


@pytest.mark.parametrize("data", JPEGS.values(), ids=JPEGS.keys())
def test_pixels_of_jpegs_are_cheap(data: bytes) -> None:
    assert cost._JPEG_PIXEL_S < cost._PIXEL_S
    assert expected_seconds(data) == pytest.approx(
        PIXELS * cost._JPEG_PIXEL_S + len(data) * cost._BYTE_S
    )


@pytest.mark.parametrize("data", [b"", b"II*\0", b"\xff" * (20 << 20), b"%PDF-1.7"])
def test_a_file_without_a_size_counts_by_its_bytes(data: bytes) -> None:
    assert expected_seconds(data) == pytest.approx(len(data) * cost._BYTE_S)


@pytest.mark.parametrize("name", seeds())
def test_broken_files_have_a_cost_too(name: str) -> None:
    for seed in range(500):
        assert expected_seconds(mutated(name, seed)) >= 0
    for data in seeds()[name]:
        for end in range(0, len(data), 7):
            assert expected_seconds(data[:end]) >= 0


def test_the_configured_limit_is_the_decoders_own() -> None:
    assert PreprocessorConfig().max_pixels == MAX_PIXELS
