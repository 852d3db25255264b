"""Image files of every kind to upright RGB images. Imports no torch.

Only pixels and orientation matter: metadata and colour profiles are passed over, and whatever is
wrong with them changes nothing. docs/api.md has the rules by which samples become RGB.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable

from PIL import Image

from blip2_serve.errors import InvalidImage
from blip2_serve.model.pictures import jpeg, png, tiff
from blip2_serve.model.pictures.colours import to_rgb
from blip2_serve.model.pictures.containers import brand_of, decode_avif, decode_heif, decode_webp
from blip2_serve.model.pictures.faults import ACCEPTED, damaged, unsupported
from blip2_serve.model.pictures.orientation import upright
from blip2_serve.model.pictures.simple import decode_bmp, decode_gif

Image.init()  # registers every format: Image.open(formats=...) only knows registered ones

# Pillow warns about odd metadata and large images, which is checked here. Filter and level are
# set once per process because `warnings.catch_warnings` is not thread-safe.
warnings.filterwarnings("ignore", module=r"PIL\.")
logging.getLogger("PIL").setLevel(logging.CRITICAL)

_log = logging.getLogger(__name__)

_Decoder = Callable[[bytes], tuple[Image.Image, int]]

_SIGNATURES: tuple[tuple[bytes, _Decoder], ...] = (
    (png.SIGNATURE, png.decode),
    (b"GIF87a", decode_gif),
    (b"GIF89a", decode_gif),
    (b"BM", decode_bmp),
    *((signature, tiff.decode) for signature in tiff.SIGNATURES),
)

# What people send and nothing here reads, by how the file begins.
_OTHERS = (
    (b"%PDF", "PDF files"),
    (b"<svg", "SVG images"),
    (b"8BPS", "Photoshop files"),
    (b"\0\0\1\0", "icons"),
    (b"\0\0\0\x0cjP  ", "JPEG 2000 images"),
    (b"\xffO\xffQ", "JPEG 2000 images"),
    (b"\0\0\0\x0cJXL ", "JPEG XL images"),
    (b"\xff\x0a", "JPEG XL images"),
    (b"v/1\1", "OpenEXR images"),
    (b"\x1aE\xdf\xa3", "videos"),
    *((b"P%d" % number, "PBM, PGM and PPM images") for number in range(1, 8)),
)


def decode(data: bytes, size: tuple[int, int]) -> Image.Image:
    """Returns an image file's pixels: upright, RGB, over white where they are transparent.

    `size` is the (width, height) that is needed of it: some decoders save work by that.

    Raises:
        InvalidImage: The file is none of an accepted format, is broken, or has too many pixels.
        MemoryError: This process may not have the memory that it takes.
    """
    try:
        if data.startswith(b"\xff\xd8\xff"):
            image, orientation = jpeg.decode(data, size)
        else:
            image, orientation = _decoder(data)(data)
        return upright(to_rgb(image), orientation)
    except (InvalidImage, MemoryError):
        raise
    except Exception as error:
        # A mistake of this package, which the operator may report; the file is broken all the same.
        _log.exception("decoding an image of %d bytes failed", len(data))
        raise damaged("image") from error


def _decoder(data: bytes) -> _Decoder:
    for signature, decoder in _SIGNATURES:
        if data.startswith(signature):
            return decoder
    if data[:4] == b"RIFF" and data[8:12] == b"WEBP":
        return decode_webp
    if data[4:8] == b"ftyp":
        brand = brand_of(data)
        if brand:
            return decode_avif if brand == "AVIF" else decode_heif
        raise unsupported("videos")
    for beginning, what in _OTHERS:
        if data.startswith(beginning):
            raise unsupported(what)
    if b"<svg" in data[:1000]:
        raise unsupported("SVG images")
    raise InvalidImage(f"this is not an image that can be read; send {ACCEPTED}", kind="format")
