"""GIF and BMP, which Pillow takes as they are."""

from __future__ import annotations

import io

from PIL import Image

from blip2_serve.model.pictures.colours import on_white
from blip2_serve.model.pictures.faults import check_size, decoding


def decode_gif(data: bytes) -> tuple[Image.Image, int]:
    """The first frame; what it does not cover is transparent."""
    with decoding("GIF"):
        image = Image.open(io.BytesIO(data), formats=("GIF",))
        check_size(image.width, image.height)
        frame = image.tile[0].extents
        image.load()
    if frame is None or frame == (0, 0, *image.size):
        return image, 1
    return on_white(image.crop(frame), image.size, frame[:2]), 1


def decode_bmp(data: bytes) -> tuple[Image.Image, int]:
    with decoding("BMP"):
        image = Image.open(io.BytesIO(data), formats=("BMP",))
        check_size(image.width, image.height)
        image.load()
    if image.mode == "RGBA" and image.getchannel("A").getextrema() == (0, 0):
        return image.convert("RGB"), 1  # whoever wrote the file left the fourth byte alone
    return image, 1
