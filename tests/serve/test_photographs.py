"""Photographs in every supported file format and mode."""

from __future__ import annotations

import io
from collections.abc import Callable

import numpy as np
import pytest
from PIL import Image
from skimage import data as photographs

from support.images import data_url, encode
from support.oracle import Oracle
from support.server import App


@pytest.fixture(scope="module")
def photo() -> Image.Image:
    return Image.fromarray(photographs.chelsea())


def _rotated(photo: Image.Image) -> bytes:
    """Returns a PNG that is stored sideways with its EXIF orientation, as phones do."""
    exif = Image.Exif()
    exif[0x0112] = 6
    return encode(photo.rotate(90, expand=True), "PNG", exif=exif)


def _transparent(photo: Image.Image) -> bytes:
    alpha = Image.new("L", photo.size, 0)
    alpha.paste(255, (50, 50, 300, 250))
    photo.putalpha(alpha)
    return encode(photo, "PNG")


def _over_white(photo: Image.Image) -> Image.Image:
    white = Image.new("RGB", photo.size, "white")
    white.paste(photo.crop((50, 50, 300, 250)), (50, 50))
    return white


def _wide_grey(photo: Image.Image) -> bytes:
    grey = np.asarray(photo.convert("L")).astype(np.uint16) * 257
    return encode(Image.fromarray(grey), "PNG")


def _reopened(data: bytes) -> Image.Image:
    return Image.open(io.BytesIO(data)).convert("RGB")


# name -> (makes the file, returns the upright RGB image that it shows)
FILES: dict[
    str, tuple[Callable[[Image.Image], bytes], Callable[[Image.Image, bytes], Image.Image]]
] = {
    "PNG": (lambda p: encode(p, "PNG"), lambda p, _: p),
    "BMP": (lambda p: encode(p, "BMP"), lambda p, _: p),
    "TIFF": (lambda p: encode(p, "TIFF"), lambda p, _: p),
    "WebP": (lambda p: encode(p, "WEBP", lossless=True), lambda p, _: p),
    "JPEG": (lambda p: encode(p, "JPEG", quality=90), lambda _, data: _reopened(data)),
    "CMYK JPEG": (
        lambda p: encode(p.convert("CMYK"), "JPEG", quality=95),
        lambda _, data: _reopened(data),
    ),
    "GIF with a second frame": (
        lambda p: encode(p.quantize(64), "GIF", save_all=True, append_images=[p.rotate(90)]),
        lambda p, _: p.quantize(64).convert("RGB"),
    ),
    "palette PNG": (
        lambda p: encode(p.quantize(64), "PNG"),
        lambda p, _: p.quantize(64).convert("RGB"),
    ),
    "grey PNG": (
        lambda p: encode(p.convert("L"), "PNG"),
        lambda p, _: p.convert("L").convert("RGB"),
    ),
    "16-bit grey PNG": (_wide_grey, lambda p, _: p.convert("L").convert("RGB")),
    "black and white PNG": (
        lambda p: encode(p.convert("1"), "PNG"),
        lambda p, _: p.convert("1").convert("RGB"),
    ),
    "PNG with alpha": (lambda p: _transparent(p.copy()), lambda p, _: _over_white(p)),
    "PNG with an EXIF orientation": (_rotated, lambda p, _: p),
}


@pytest.mark.parametrize("name", FILES)
def test_tokens_equal_those_of_transformers_for_the_upright_rgb_image(
    name: str, random_model: tuple[App, Oracle], photo: Image.Image
) -> None:
    app, oracle = random_model
    make, shown = FILES[name]
    data = make(photo)
    body = {"image": data_url(data), "max_tokens": 12, "return_token_ids": True}
    response = app.post("/v1/generate", json=body)
    assert response.status_code == 200, response.text
    ids = response.json()["choices"][0]["token_ids"]
    expected = oracle.tokens(shown(photo, data), "", max_new_tokens=12)
    assert oracle.without_eos(ids) == expected


def test_each_of_several_uploads_gets_one_result(
    random_model: tuple[App, Oracle], photo: Image.Image
) -> None:
    app, oracle = random_model
    coffee = Image.fromarray(photographs.coffee())
    broken = encode(photo, "JPEG")[:2000]
    files = [
        ("image", (f"{i}.png", content))
        for i, content in enumerate((encode(photo), broken, encode(coffee)))
    ]
    response = app.post("/v1/caption", files=files, data={"max_tokens": "9"})
    assert response.status_code == 200, response.text
    first, second, third = response.json()["data"]
    for item, image in ((first, photo), (third, coffee)):
        ids = oracle.tokens(image, "", max_new_tokens=9)
        text = oracle.processor.tokenizer.decode(ids, skip_special_tokens=True)
        assert item["caption"] == text.strip()
    assert second["error"]["code"] == "invalid_image"
    assert [item["index"] for item in (first, second, third)] == [0, 1, 2]
