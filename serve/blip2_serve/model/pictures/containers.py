"""Files of boxes: WebP, which is RIFF, and AVIF and HEIC, which are ISO media files.

Metadata are taken out or hidden before a decoder sees them.
"""

from __future__ import annotations

import io
import struct
from collections.abc import Iterator

import pillow_heif
from PIL import AvifImagePlugin, Image

from blip2_serve.model.pictures.faults import check_parts, check_size, cut_off, damaged, decoding
from blip2_serve.model.pictures.orientation import find_orientation

# The preprocessor has threads of its own. What is switched off here is not looked at anyway.
AvifImagePlugin.DEFAULT_MAX_THREADS = 1
pillow_heif.register_heif_opener(
    decode_threads=1, thumbnails=False, depth_images=False, aux_images=False
)

_AVIF = {b"avif", b"avis"}
_HEIF = {b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"hevm", b"hevs"}
_EITHER = {b"mif1", b"msf1"}
_METADATA_ITEMS = (b"Exif", b"mime")


def decode_webp(data: bytes) -> tuple[Image.Image, int]:
    """The picture, or the first frame of an animation, and its orientation."""
    kept: list[bytes] = []
    exif = xmp = b""
    flags = 0
    first_is_there = False
    for name, body, whole in _riff_chunks(data):
        if name in (b"VP8 ", b"VP8L", b"ANMF"):
            if whole and not first_is_there:
                kept.append(_riff_chunk(name, body))
            elif not first_is_there:
                raise cut_off("WebP")
            first_is_there = True
        elif name == b"VP8X" and len(body) >= 10:
            flags = body[0]
            width, height = (int.from_bytes(body[i : i + 3], "little") + 1 for i in (4, 7))
            check_size(width, height)
            kept.append(_riff_chunk(name, bytes((flags & 0b0001_0010,)) + body[1:]))
        elif name in (b"ANIM", b"ALPH"):
            kept.append(_riff_chunk(name, body))
        elif name == b"EXIF" and flags:
            exif = exif or body
        elif name == b"XMP " and flags:
            xmp = xmp or body
    if not first_is_there:
        raise cut_off("WebP")
    body = b"".join((b"WEBP", *kept))
    clean = b"".join((b"RIFF", struct.pack("<L", len(body)), body))
    with decoding("WebP"):
        image = Image.open(io.BytesIO(clean), formats=("WEBP",))
        check_size(image.width, image.height)
        image.load()
    return image, find_orientation(exif, xmp)


def _riff_chunks(data: bytes) -> Iterator[tuple[bytes, bytes, bool]]:
    """Name, body and whether all of it is there, of each chunk. Padding belongs to no body."""
    position, parts = 12, 0
    while position + 8 <= len(data):
        parts += 1
        check_parts(parts, "WebP")
        name = data[position : position + 4]
        (length,) = struct.unpack_from("<L", data, position + 4)
        end = position + 8 + length
        yield name, data[position + 8 : end], end <= len(data)
        position = end + length % 2


def _riff_chunk(name: bytes, body: bytes) -> bytes:
    return b"".join((name, struct.pack("<L", len(body)), body, b"\0" * (len(body) % 2)))


def brand_of(data: bytes) -> str:
    """AVIF or HEIF by its own name, "" if a file of boxes is something else."""
    (length,) = struct.unpack_from(">L", data)
    kinds = data[8:12], *(data[i : i + 4] for i in range(16, min(length, len(data), 512), 4))
    for brands, name in ((_AVIF, "AVIF"), (_HEIF, "HEIF"), (_EITHER, "HEIF")):
        if brands & {*kinds}:
            return name
    return ""


def decode_avif(data: bytes) -> tuple[Image.Image, int]:
    clean = _prepared(data, b"avif")
    image = _load(clean, "AVIF", "AVIF")
    # Pillow writes EXIF of its own for the orientation that an AVIF has in its boxes.
    return image, find_orientation(image.info.get("exif", b""))


def decode_heif(data: bytes) -> tuple[Image.Image, int]:
    """libheif turns the image upright by itself."""
    return _load(_prepared(data, b"heic"), "HEIF", "HEIC"), 1


def _load(data: bytes, plugin: str, name: str) -> Image.Image:
    whole = all(end <= len(data) for _, _, end in _boxes(data, 0, len(data)))
    with decoding(name):
        try:
            image = Image.open(io.BytesIO(data), formats=(plugin,))
            check_size(image.width, image.height)
            image.load()
        except (OSError, SyntaxError, ValueError) as error:
            raise (damaged(name) if whole else cut_off(name)) from error
    return image


def _boxes(data: bytes, start: int, stop: int) -> Iterator[tuple[bytes, int, int]]:
    """Name, start of the body and end of each box; the last one may end after `stop`."""
    parts = 0
    while start + 8 <= stop:
        parts += 1
        check_parts(parts, "AVIF and HEIC")
        length, name = struct.unpack_from(">L4s", data, start)
        body = start + 8
        if length == 1 and body + 8 <= stop:
            (length,) = struct.unpack_from(">Q", data, body)
            body += 8
        end = start + length if length else stop
        if end < body:
            return
        yield name, body, end
        start = end


def _prepared(data: bytes, brand: bytes) -> bytes:
    """Renames the items that are no pictures, so that nobody looks at them.

    The main brand becomes `brand` unless it is one that decoders take.

    Raises:
        InvalidImage: Some item has too many pixels, even if little of it is shown.
    """
    clean = bytearray(data)
    if data[8:12] not in _AVIF | _HEIF | _EITHER:
        clean[8:12] = brand
    for place in _bodies(data, b"meta", b"iinf", b"infe"):
        kind = place + (8 if data[place : place + 1] == b"\2" else 10)
        if data[kind : kind + 4] in _METADATA_ITEMS:
            clean[kind : kind + 4] = b"skip"
    for place in _bodies(data, b"meta", b"iprp", b"ipco", b"ispe"):
        check_size(*(int.from_bytes(data[place + i : place + i + 4], "big") for i in (4, 8)))
    return bytes(clean)


def _bodies(data: bytes, *path: bytes) -> Iterator[int]:
    """Where the bodies of boxes begin that are inside boxes of these names."""
    places = [(0, len(data))]
    for name in path:
        places = [
            (body + _own_fields(data, name, body), min(end, len(data)))
            for start, stop in places
            for found, body, end in _boxes(data, start, stop)
            if found == name
        ]
    return (body for body, _ in places)


def _own_fields(data: bytes, name: bytes, body: int) -> int:
    """How many bytes a box has before those that it contains."""
    if name == b"iinf":
        return 6 if data[body : body + 1] == b"\0" else 8
    return 4 if name == b"meta" else 0
