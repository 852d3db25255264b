"""Files of boxes: WebP, which is RIFF, and AVIF and HEIC, which are ISO media files.

Metadata are taken out or hidden before a decoder sees them.
"""

from __future__ import annotations

import io
import struct
from collections.abc import Iterator

import pillow_heif
from PIL import AvifImagePlugin, Image

from blip2_serve.model.pictures.faults import check_size, cut_off, damaged, decoding
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
    position = 12
    while position + 8 <= len(data):
        name = data[position : position + 4]
        (length,) = struct.unpack_from("<L", data, position + 4)
        end = position + 8 + length
        yield name, data[position + 8 : end], end <= len(data)
        position = end + length % 2


def _riff_chunk(name: bytes, body: bytes) -> bytes:
    return b"".join((name, struct.pack("<L", len(body)), body, b"\0" * (len(body) % 2)))


def brand_of(data: bytes) -> str:
    """ "AVIF", "HEIF", or "" if a file of boxes is something else."""
    (length,) = struct.unpack_from(">L", data)
    kinds = data[8:12], *(data[i : i + 4] for i in range(16, min(length, len(data), 512), 4))
    for brands, name in ((_AVIF, "AVIF"), (_HEIF, "HEIF"), (_EITHER, "HEIF")):
        if brands & {*kinds}:
            return name
    return ""


def decode_avif(data: bytes) -> tuple[Image.Image, int]:
    clean = _without_metadata(data, b"avif")
    image = _load(clean, "AVIF", "AVIF")
    # Pillow writes EXIF of its own for the orientation that an AVIF has in its boxes.
    return image, find_orientation(image.info.get("exif", b""))


def decode_heif(data: bytes) -> tuple[Image.Image, int]:
    """libheif turns the image upright by itself."""
    return _load(_without_metadata(data, b"heic"), "HEIF", "HEIC"), 1


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
    while start + 8 <= stop:
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


def _without_metadata(data: bytes, brand: bytes) -> bytes:
    """Renames the items that are no pictures, so that nobody looks at them.

    The main brand becomes `brand` unless it is one that decoders take.
    """
    clean = bytearray(data)
    if data[8:12] not in _AVIF | _HEIF | _EITHER:
        clean[8:12] = brand
    for name, start, end in _boxes(data, 0, len(data)):
        if name != b"meta":
            continue
        for inner, begin, stop in _boxes(data, start + 4, min(end, len(data))):
            if inner != b"iinf" or begin + 8 > len(data):
                continue
            entries = begin + (6 if data[begin] == 0 else 8)
            for entry, item, _ in _boxes(data, entries, min(stop, len(data))):
                kind = item + (8 if data[item : item + 1] == b"\2" else 10)
                if entry == b"infe" and data[kind : kind + 4] in _METADATA_ITEMS:
                    clean[kind : kind + 4] = b"skip"
    return bytes(clean)
