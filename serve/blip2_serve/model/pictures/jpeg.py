"""JPEG: drops the metadata before Pillow parses it, and does without the end marker."""

from __future__ import annotations

import io
import re
import struct
from dataclasses import dataclass

from PIL import Image

from blip2_serve.errors import InvalidImage
from blip2_serve.model.pictures.faults import (
    check_parts,
    check_size,
    cut_off,
    decoding,
    unsupported,
)
from blip2_serve.model.pictures.orientation import find_orientation

# A JPEG may be decoded at 1/2, 1/4 or 1/8 of its size as long as each side still has this many
# times the pixels of the result. Compared with full decoding, a photograph's pixels then differ by
# at most half a grey level (of 255) on average and by at most 20 at the sharpest edges.
DRAFT_OVERSAMPLING = 4
DRAFT_MEAN_TOLERANCE, DRAFT_TOLERANCE = 0.5, 20

_START_OF_SCAN, _END = 0xDA, b"\xff\xd9"
FRAMES = {*range(0xC0, 0xD0)} - {0xC4, 0xC8, 0xCC}  # C4, C8 and CC are other segments
_PROGRESSIVE = {0xC2, 0xC6, 0xCA, 0xCE}
_NO_LENGTH = {0x00, 0x01, *range(0xD0, 0xD9)}
_METADATA = {*range(0xE0, 0xF0), 0xFE}
_AFTER_SCAN = re.compile(rb"\xff[^\x00\xd0-\xd7\xff]")

_EXIF, _XMP = b"Exif\0\0", b"http://ns.adobe.com/xap/1.0/\0"

# Bytes that decode to different coefficients, wherever they are read as such.
_FILLERS = (bytes(range(255)) * 4, bytes(range(254, -1, -1)) * 4)


@dataclass(frozen=True)
class _Segment:
    marker: int
    start: int  # of the marker
    end: int
    body: bytes


def decode(data: bytes, size: tuple[int, int]) -> tuple[Image.Image, int]:
    """The image and its orientation; `size` is the (width, height) that is needed of it."""
    segments, scan = _header(data)
    exif = xmp = b""
    kept: list[bytes] = []
    position = 0
    for segment in segments:
        marker, body = segment.marker, segment.body
        if marker in FRAMES and body[:1] > b"\x08":
            raise unsupported(f"JPEG images of {body[0]} bits per sample")
        if marker == 0xE1 and body.startswith(_EXIF):
            exif = exif or body
        elif marker == 0xE1 and body.startswith(_XMP):
            xmp = xmp or body
        if marker in _METADATA and not _says_which_colours(marker, body):
            kept.append(data[position : segment.start])
            position = segment.end
    clean = b"".join((*kept, data[position:])) if kept else data
    orientation = find_orientation(exif, xmp)
    try:
        return _load(clean, size), orientation
    except InvalidImage as error:
        if error.kind != "truncated" or scan is None:
            raise
    return _load_without_end(clean, size), orientation


def _says_which_colours(marker: int, body: bytes) -> bool:
    """JFIF's and Adobe's segments. Both decoders, libjpeg and Pillow, read them at these sizes."""
    if marker == 0xE0:
        return body.startswith(b"JFIF\0") and len(body) >= 14
    return marker == 0xEE and body.startswith(b"Adobe") and len(body) >= 12


def _header(data: bytes) -> tuple[list[_Segment], int | None]:
    """The segments before the first scan, and where that scan's segment starts, if it does."""
    segments: list[_Segment] = []
    position = 2
    while (position := data.find(b"\xff", position)) >= 0:
        start = position
        while data[position : position + 1] == b"\xff":
            position += 1
        if position >= len(data):
            break
        marker = data[position]
        position += 1
        if marker in _NO_LENGTH:
            continue
        if marker in (_START_OF_SCAN, _END[1]):
            return segments, start if marker == _START_OF_SCAN else None
        if position + 2 > len(data):
            break
        (length,) = struct.unpack_from(">H", data, position)
        end = position + length
        if length >= 2 and end > len(data):
            break
        check_parts(len(segments), "JPEG")
        segments.append(_Segment(marker, start, end, data[position + 2 : end]))
        position = max(end, position + 2)
    raise cut_off("JPEG")


def _load(data: bytes, size: tuple[int, int]) -> Image.Image:
    with decoding("JPEG"):
        image = Image.open(io.BytesIO(data), formats=("JPEG",))
        check_size(image.width, image.height)
        if image.mode in ("RGB", "L"):
            image.draft(None, (DRAFT_OVERSAMPLING * size[0], DRAFT_OVERSAMPLING * size[1]))
        image.load()
    return image


def _load_without_end(data: bytes, size: tuple[int, int]) -> Image.Image:
    """Loads a file whose end marker is missing, if that is all that is missing.

    libjpeg fills up what is missing, in silence. If anything is, other bytes in its place give
    another picture.

    Raises:
        InvalidImage: More is missing.
    """
    data = data.rstrip(b"\xff")
    if not _has_all_scans(data):
        raise cut_off("JPEG")
    image = _load(data + _END, size)
    pixels = hash(image.tobytes())
    for filler in _FILLERS:
        if hash(_load(data + filler + _END, size).tobytes()) != pixels:
            raise cut_off("JPEG")
    return image


def _has_all_scans(data: bytes) -> bool:
    """Whether a scan brings each coefficient of each component to its last bit, or begins to."""
    missing: dict[int, set[int]] = {}
    progressive = False
    position, parts = 2, 0
    while match := _AFTER_SCAN.search(data, position):
        marker, position = data[match.start() + 1], match.end()
        if marker in _NO_LENGTH or position + 2 > len(data):
            continue
        (length,) = struct.unpack_from(">H", data, position)
        body = data[position + 2 : position + length]
        position += length
        parts += 1
        check_parts(parts, "JPEG")
        if marker in FRAMES and len(body) >= 6:
            progressive = marker in _PROGRESSIVE
            missing = {component: set(range(64)) for component in body[6::3]}
        elif marker == _START_OF_SCAN and len(body) >= 4:
            components = body[1 : 1 + 2 * body[0] : 2]
            first, last, bits = body[-3:]
            for component in components:
                if not progressive:
                    missing.pop(component, None)
                elif component in missing and bits & 15 == 0:
                    missing[component] -= {*range(first, last + 1)}
    return not any(missing.values())
