"""Image files of every kind become the same pixels as with transformers' processor."""

from __future__ import annotations

import json
import threading
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from skimage import data as photographs
from transformers.models.blip.image_processing_pil_blip import BlipImageProcessorPil

from blip2_serve.errors import InvalidImage, StartupError
from blip2_serve.model import pictures
from blip2_serve.model.pictures import jpeg
from blip2_serve.model.pictures.jpeg import DRAFT_MEAN_TOLERANCE, DRAFT_TOLERANCE
from blip2_serve.model.processor import ImageProcessor
from blip2_serve.model.source import DEMO_FOLDER
from support.images import encode

NORMALISED_TOLERANCE = 1e-6


def processor(size: int = 224) -> ImageProcessor:
    loaded = ImageProcessor.load(DEMO_FOLDER)
    return ImageProcessor((size, size), loaded.mean, loaded.std, loaded.rescale, loaded.resample)


PHOTOGRAPHS = {
    "astronaut": photographs.astronaut(),
    "cat": photographs.chelsea(),
    "coffee": photographs.coffee(),
    "rocket": photographs.rocket(),
}


@pytest.mark.parametrize("size", [224, 364])
@pytest.mark.parametrize("name", PHOTOGRAPHS)
def test_normalised_pixels_equal_those_of_transformers(name: str, size: int) -> None:
    image = Image.fromarray(PHOTOGRAPHS[name])
    own = processor(size)
    pixels = own.pixels(encode(image))
    assert pixels.shape == (3, size, size)
    assert pixels.dtype == np.uint8
    mean, std = (np.float32(v).reshape(3, 1, 1) for v in (own.mean, own.std))
    normalised = (pixels.astype(np.float32) * np.float32(own.rescale) - mean) / std
    reference = BlipImageProcessorPil(size={"height": size, "width": size})
    expected = reference(image, return_tensors="np")["pixel_values"][0]
    assert np.abs(normalised - expected).max() <= NORMALISED_TOLERANCE


@pytest.mark.parametrize("orientation", range(1, 9))
def test_the_exif_orientation_is_applied(orientation: int) -> None:
    stored = Image.fromarray(PHOTOGRAPHS["cat"]).resize((90, 60))
    exif = Image.Exif()
    exif[0x0112] = orientation
    upright = {
        1: lambda i: i,
        2: lambda i: i.transpose(Image.Transpose.FLIP_LEFT_RIGHT),
        3: lambda i: i.transpose(Image.Transpose.ROTATE_180),
        4: lambda i: i.transpose(Image.Transpose.FLIP_TOP_BOTTOM),
        5: lambda i: i.transpose(Image.Transpose.TRANSPOSE),
        6: lambda i: i.transpose(Image.Transpose.ROTATE_270),
        7: lambda i: i.transpose(Image.Transpose.TRANSVERSE),
        8: lambda i: i.transpose(Image.Transpose.ROTATE_90),
    }[orientation](stored)
    assert np.array_equal(
        processor().pixels(encode(stored, exif=exif)), processor().pixels(encode(upright))
    )


@pytest.mark.parametrize(
    "mode", ["RGBA", "LA", "P with a transparent color", "RGB with a transparent color"]
)
def test_transparent_pixels_become_white(mode: str) -> None:
    # The left half is transparent, the right half dark grey.
    grey = Image.new("L", (64, 64), 40)
    if mode in ("RGBA", "LA"):
        alpha = Image.new("L", (64, 64), 0)
        alpha.paste(255, (32, 0, 64, 64))
        image = grey.convert("RGB" if mode == "RGBA" else "L")
        image.putalpha(alpha)
        data = encode(image)
    else:
        grey.paste(200, (0, 0, 32, 64))
        rgb = grey.convert("RGB")
        data = (
            encode(rgb, transparency=(200, 200, 200))
            if mode.startswith("RGB")
            else encode(rgb.quantize(2), transparency=_index_of(rgb.quantize(2), 200))
        )
    pixels = processor(64).pixels(data)
    assert pixels[:, 32, 8].tolist() == [255, 255, 255]
    assert pixels[:, 32, 56].tolist() == [40, 40, 40]


def _index_of(image: Image.Image, grey: int) -> int:
    palette = image.getpalette()
    assert palette is not None
    return palette[::3].index(grey)


@pytest.mark.parametrize("format", ["PNG", "TIFF"])
def test_16_bit_grey_is_scaled_to_8_bits(format: str) -> None:
    grey = (
        np.array([[0, 257 * 100], [257 * 200, 65535]], dtype=np.uint16).repeat(16, 0).repeat(16, 1)
    )
    pixels = processor(32).pixels(encode(Image.fromarray(grey), format))
    corners = pixels[0, [4, 4, 28, 28], [4, 28, 4, 28]]
    assert corners.tolist() == [0, 100, 200, 255]


@pytest.mark.slow
@pytest.mark.parametrize("size", [224, 364])
@pytest.mark.parametrize("name", PHOTOGRAPHS)
@pytest.mark.parametrize("scale", [4, 9])
def test_draft_decoding_of_large_jpegs_stays_within_tolerance(
    name: str, size: int, scale: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    photo = Image.fromarray(PHOTOGRAPHS[name])
    large = photo.resize((photo.width * scale, photo.height * scale), Image.Resampling.LANCZOS)
    data = encode(large, "JPEG", quality=90)
    drafted = processor(size).pixels(data).astype(int)
    monkeypatch.setattr(jpeg, "DRAFT_OVERSAMPLING", 1_000)  # never
    whole = processor(size).pixels(data).astype(int)
    assert np.abs(drafted - whole).max() <= DRAFT_TOLERANCE
    assert np.abs(drafted - whole).mean() <= DRAFT_MEAN_TOLERANCE


def test_a_large_jpeg_is_decoded_at_a_fraction_of_its_size(monkeypatch: pytest.MonkeyPatch) -> None:
    decoded: list[tuple[int, int]] = []
    original = pictures.to_rgb
    monkeypatch.setattr(pictures, "to_rgb", lambda i: decoded.append(i.size) or original(i))
    processor(224).pixels(encode(Image.new("RGB", (4000, 3000)), "JPEG"))
    processor(224).pixels(encode(Image.new("RGB", (800, 600)), "JPEG"))
    assert decoded == [(2000, 1500), (800, 600)]


@pytest.mark.parametrize(
    "data",
    [
        pytest.param(b"", id="no bytes"),
        pytest.param(b"I am a PNG", id="text"),
        pytest.param(b"%PDF-1.7 ...", id="a PDF"),
        pytest.param(encode(Image.new("RGB", (99, 99)), "PPM"), id="an unsupported format"),
        *(
            pytest.param(
                encode(Image.fromarray(PHOTOGRAPHS["cat"]), kind)[:3000], id=f"half a {kind}"
            )
            for kind in ("PNG", "JPEG", "BMP", "TIFF", "GIF", "WEBP")
        ),
    ],
)
def test_incomplete_and_unsupported_files_are_invalid(data: bytes) -> None:
    with pytest.raises(InvalidImage):
        processor().pixels(data)


def test_an_image_with_too_many_pixels_is_rejected_before_decoding() -> None:
    bomb = encode(Image.new("1", (20_000, 20_000)))
    assert len(bomb) < 100_000
    with pytest.raises(InvalidImage, match="pixels"):
        processor().pixels(bomb)


def test_the_older_config_file_is_supported(tmp_path: Path) -> None:
    (tmp_path / "preprocessor_config.json").write_text(
        json.dumps({"size": {"height": 364, "width": 364}, "image_mean": [0.5, 0.5, 0.5]})
    )
    loaded = ImageProcessor.load(tmp_path)
    assert loaded.size == (364, 364)
    assert loaded.mean == (0.5, 0.5, 0.5)


@pytest.mark.parametrize("config", [{"do_center_crop": True}, {"do_resize": False}])
def test_a_processor_with_other_steps_is_rejected(config: dict[str, bool], tmp_path: Path) -> None:
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(config))
    with pytest.raises(StartupError):
        ImageProcessor.load(tmp_path)


def test_concurrent_decoding_does_not_change_warning_filters(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    data, own, before = encode(Image.new("RGB", (8, 8))), processor(), [*warnings.filters]
    first_is_in, second_is_in = threading.Event(), threading.Event()
    opened = Image.open

    def one_after_the_other(*args: Any, **options: Any) -> Any:
        """Lets the first thread leave while the second is still inside."""
        if not first_is_in.is_set():
            first_is_in.set()
            assert second_is_in.wait(10)
        else:
            second_is_in.set()
            first.join(10)
        return opened(*args, **options)

    monkeypatch.setattr(Image, "open", one_after_the_other)
    first, second = (threading.Thread(target=own.pixels, args=(data,)) for _ in range(2))
    first.start()
    assert first_is_in.wait(10)
    second.start()
    second.join(10)
    assert [*warnings.filters] == before
