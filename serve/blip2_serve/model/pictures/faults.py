"""What can be wrong with a picture, in words for its sender, and the limits that it must keep."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from PIL import Image

from blip2_serve.errors import InvalidImage

ACCEPTED = "JPEG, PNG, WebP, AVIF, HEIC, GIF, TIFF or BMP"

MAX_PIXELS = 40_000_000  # unless `limit_pixels` sets another limit

# Segments, chunks, boxes, strips or tiles of one file; each costs time and memory in Python.
MAX_PARTS = 100_000

# Above twice this Pillow refuses by itself, after the checks here, which name the numbers.
Image.MAX_IMAGE_PIXELS = 1 << 31

_max_pixels = MAX_PIXELS


def limit_pixels(maximum: int) -> None:
    """Sets the most pixels of an image, for the whole process, as Pillow's own limit is."""
    global _max_pixels
    _max_pixels = maximum


def max_sample_bytes() -> int:
    """Most bytes of decoded samples of more than 8 bits, which TIFF has in any number and width."""
    return 4 * _max_pixels


def cut_off(name: str) -> InvalidImage:
    return InvalidImage(
        f"the image is cut off: its {name} data end before the last pixel; send the whole file",
        kind="truncated",
    )


def damaged(name: str) -> InvalidImage:
    return InvalidImage(
        f"the image is damaged: its {name} data cannot be decoded; send an intact copy"
    )


def unsupported(what: str) -> InvalidImage:
    return InvalidImage(f"{what} are not supported; send {ACCEPTED}", kind="format")


def too_large(width: int, height: int) -> InvalidImage:
    return InvalidImage(
        f"the image is too large: {width} x {height} pixels; the maximum is {_max_pixels:,} pixels",
        kind="pixels",
    )


def out_of_memory() -> InvalidImage:
    return InvalidImage(
        "decoding the image takes more memory than the server allows; send a smaller one",
        kind="memory",
    )


def check_size(width: int, height: int) -> None:
    """
    Raises:
        InvalidImage: more than the limit.
    """
    if width * height > _max_pixels:
        raise too_large(width, height)


def check_parts(number: int, name: str) -> None:
    """
    Raises:
        InvalidImage: more than `MAX_PARTS`.
    """
    if number > MAX_PARTS:
        raise unsupported(f"{name} images of more than {MAX_PARTS:,} parts")


@contextmanager
def decoding(name: str) -> Iterator[None]:
    """Turns whatever a decoder raises inside into an error of ours; `name` is the format's.

    Pillow leaks the errors of its parsers (SyntaxError, struct.error, IndexError, zlib.error, ...).
    Each of them means that the file is broken.
    """
    try:
        yield
    except (InvalidImage, MemoryError):  # the second is no fault of the file's
        raise
    except Image.DecompressionBombError as error:
        raise InvalidImage(
            f"the image is too large; the maximum is {_max_pixels:,} pixels", kind="pixels"
        ) from error
    except Exception as error:
        # Only the words depend on Pillow's text.
        truncated = isinstance(error, OSError) and "truncated" in str(error).lower()
        raise (cut_off(name) if truncated else damaged(name)) from error
