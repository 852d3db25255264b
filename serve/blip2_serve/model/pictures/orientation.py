"""Which way up a picture is. Reads the one tag of EXIF or XMP that says so, and nothing else."""

from __future__ import annotations

import re
import struct

from PIL import Image

_TAG = 0x0112
_INTEGERS = {1: "B", 3: "H", 4: "L", 6: "b", 8: "h", 9: "l"}  # by TIFF's number of the type
_XMP = re.compile(rb"tiff:Orientation(?:=[\"']|>)([1-8])")
_PREFIX = b"Exif\0\0"

_METHODS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


def upright(image: Image.Image, orientation: int) -> Image.Image:
    method = _METHODS.get(orientation)
    return image if method is None else image.transpose(method)


def find_orientation(exif: bytes = b"", xmp: bytes = b"") -> int:
    """1 to 8, as EXIF counts. 1, which is upright, if neither has a usable value."""
    return _of_exif(exif) or _of_xmp(xmp) or 1


def _of_xmp(xmp: bytes) -> int:
    match = _XMP.search(xmp)
    return int(match[1]) if match else 0


def _of_exif(exif: bytes) -> int:
    """0 if there is no such tag, or no EXIF at all."""
    while exif.startswith(_PREFIX):
        exif = exif[len(_PREFIX) :]
    order = {b"II": "<", b"MM": ">"}.get(exif[:2])
    try:
        if order is None or 42 not in (*exif[2:4],):
            return 0
        (start,) = struct.unpack_from(f"{order}L", exif, 4)
        (count,) = struct.unpack_from(f"{order}H", exif, start)
        for position in range(start + 2, start + 2 + 12 * count, 12):
            tag, kind, values = struct.unpack_from(f"{order}HHL", exif, position)
            if tag == _TAG:
                if kind not in _INTEGERS or values < 1:
                    return 0
                (value,) = struct.unpack_from(f"{order}{_INTEGERS[kind]}", exif, position + 8)
                return value if 1 <= value <= 8 else 0
    except struct.error:
        pass  # it ends early
    return 0
