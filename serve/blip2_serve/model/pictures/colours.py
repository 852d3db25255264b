"""Any mode of Pillow's, and samples of more than 8 bits, to RGB of 8 bits per channel."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray
from PIL import Image

Pixels = NDArray[np.uint8]

_BAND_PIXELS = 1 << 18  # converted at a time: numpy's temporary arrays stay in the cache


def to_rgb(image: Image.Image) -> Image.Image:
    """Converts a mode of 8 bits per channel or less. White shows through what is transparent."""
    if image.mode == "RGB" and "transparency" not in image.info:
        return image
    if image.mode in ("RGBA", "LA", "PA", "RGBa", "La") or "transparency" in image.info:
        if image.mode == "La":
            image = image.convert("LA")
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, "white")
        image = Image.alpha_composite(white, image)
    return image.convert("RGB")


def on_white(image: Image.Image, size: tuple[int, int], corner: tuple[int, int]) -> Image.Image:
    """A part of a picture whose other pixels are transparent, in RGB."""
    canvas = Image.new("RGB", size, "white")
    canvas.paste(to_rgb(image), corner)
    return canvas


def by_bands(
    sources: Sequence[Image.Image],
    size: tuple[int, int],
    convert: Callable[..., Pixels],
) -> Image.Image:
    """Converts rows of samples to 8 bits, a few at a time, so that memory stays small.

    Args:
        sources: Images of equally many rows, whose width is their own affair.
        size: (width, height) of the result.
        convert: Takes equal rows of each source, returns uint8 [rows, width] or
            [rows, width, 2 to 4], with as many channels each time.
    """
    width, height = size
    rows = max(1, _BAND_PIXELS // width)
    result: Image.Image | None = None
    for top in range(0, height, rows):
        bottom = min(top + rows, height)
        pieces = (np.asarray(source.crop((0, top, source.width, bottom))) for source in sources)
        band = Image.fromarray(np.ascontiguousarray(convert(*pieces)))
        if result is None:
            result = Image.new(band.mode, size)
        result.paste(band, (0, top))
    assert result is not None
    return result


def narrow(values: NDArray[np.uint16]) -> Pixels:
    """65535 becomes 255, as 65535 = 255 * 257."""
    return ((values.astype(np.uint32) + 128) // 257).astype(np.uint8)
