"""PNG: keeps the chunks that pixels are made of, takes 16 bits whole, and shows what APNG shows."""

from __future__ import annotations

import io
import re
import struct
import zlib
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from blip2_serve.errors import InvalidImage
from blip2_serve.model.pictures.colours import Pixels, by_bands, narrow, on_white
from blip2_serve.model.pictures.faults import check_parts, check_size, cut_off, damaged, decoding
from blip2_serve.model.pictures.orientation import find_orientation

SIGNATURE = b"\x89PNG\r\n\x1a\n"
_GREY, _RGB, _PALETTE, _GREY_ALPHA, _RGBA = 0, 2, 3, 4, 6
_MAX_TEXT = 1 << 20  # inflated bytes of a chunk that may tell the orientation
_RAW_PROFILE = re.compile(rb"\s*exif\s+\d+\s+([0-9a-fA-F\s]+)")

Chunk = bytes | memoryview  # with its length, name and checksum


@dataclass
class _File:
    header: bytes  # the body of IHDR
    palette: Chunk = b""
    transparency: Chunk = b""
    pixels: list[Chunk] = field(default_factory=list)
    exif: bytes = b""
    xmp: bytes = b""
    animated: bool = False
    frame: bytes = b""  # the body of the first fcTL
    frame_pixels: list[Chunk] = field(default_factory=list)
    frame_is_over: bool = False
    default_is_a_frame: bool = False

    @property
    def size(self) -> tuple[int, int]:
        width, height = struct.unpack(">2L", self.header[:8])
        return width, height

    @property
    def depth(self) -> int:
        return self.header[8]

    @property
    def colours(self) -> int:
        return self.header[9]

    @property
    def transparent(self) -> tuple[int, ...]:
        """The one transparent colour of a file without palette or alpha channel, if it has any."""
        body = bytes(self.transparency[8:-4])
        mask = (1 << self.depth) - 1
        return tuple(value & mask for value in struct.unpack(f">{len(body) // 2}H", body))


def decode(data: bytes) -> tuple[Image.Image, int]:
    """The picture, or the first one that an animation shows, and its orientation."""
    file = _read(data)
    check_size(*file.size)
    orientation = find_orientation(file.exif, file.xmp)
    if file.animated and file.frame_pixels and not file.default_is_a_frame:
        try:
            return _first_frame(file), orientation
        except InvalidImage:
            pass  # the default image is there for this case
    if not file.pixels:
        raise cut_off("PNG")
    return _load(file, file.header, file.pixels), orientation


def _read(data: bytes) -> _File:
    """Checks and sorts the chunks. Like libpng, goes on without an ancillary chunk that is broken.

    Raises:
        InvalidImage: A critical chunk is broken.
    """
    view = memoryview(data)
    file: _File | None = None
    position, parts = len(SIGNATURE), 0
    while position + 8 <= len(data):
        (length,) = struct.unpack_from(">L", data, position)
        name = data[position + 4 : position + 8]
        end = position + 12 + length
        parts += 1
        check_parts(parts, "PNG")
        if not (name.isalpha() and name.isascii()):
            raise damaged("PNG")
        body = view[position + 8 : end - 4]
        intact = end <= len(data) and zlib.crc32(view[position + 4 : end - 4]) == int.from_bytes(
            view[end - 4 : end], "big"
        )
        critical = name[:1].isupper()
        if critical and not intact and end <= len(data):
            raise damaged("PNG")
        if file is None:
            if not intact:
                raise cut_off("PNG")
            if name != b"IHDR" or length != 13:
                raise damaged("PNG")
            file = _File(bytes(body))
        elif name == b"IEND" or (end > len(data) and name != b"IDAT"):
            break
        elif intact or critical:
            _sort(file, name, body, view[position:end] if intact else _chunk(name, body))
        position = end
    if file is None:
        raise cut_off("PNG")
    return file


def _sort(file: _File, name: bytes, body: memoryview, chunk: Chunk) -> None:
    if name == b"IDAT":
        file.pixels.append(chunk)
    elif name == b"PLTE" and not file.pixels and file.colours == _PALETTE:
        file.palette = chunk
    elif name == b"tRNS" and not file.pixels and not file.transparency:
        least, most = {
            _GREY: (2, 2),
            _RGB: (6, 6),
            _PALETTE: (1, (len(file.palette) - 12) // 3),
        }.get(file.colours, (0, -1))
        if least <= len(body) <= most:
            file.transparency = chunk
    elif name == b"eXIf":
        file.exif = file.exif or bytes(body)
    elif name in (b"tEXt", b"zTXt", b"iTXt"):
        _sort_text(file, name, bytes(body))
    elif name == b"acTL":
        file.animated = len(body) == 8 and bytes(body[:4]) != bytes(4)
    elif name == b"fcTL" and file.frame:
        file.frame_is_over = True
    elif name == b"fcTL" and len(body) == 26:
        file.frame = bytes(body)
        file.default_is_a_frame = not file.pixels
    elif name == b"fdAT" and file.frame and not file.frame_is_over:
        file.frame_pixels.append(_chunk(b"IDAT", body[4:]))


def _sort_text(file: _File, name: bytes, body: bytes) -> None:
    """Keeps the two texts that may tell the orientation."""
    key, _, text = body.partition(b"\0")
    if key == b"XML:com.adobe.xmp" and name == b"iTXt" and not file.xmp:
        compressed = text[:1] == b"\1"
        text = text[2:].split(b"\0", 2)[-1]
        file.xmp = _inflate(text) if compressed else text
    elif key == b"Raw profile type exif" and name != b"iTXt" and not file.exif:
        match = _RAW_PROFILE.match(_inflate(text[1:]) if name == b"zTXt" else text)
        digits = b"".join(match[1].split()) if match else b""
        file.exif = bytes.fromhex(digits[: len(digits) // 2 * 2].decode())


def _inflate(text: bytes) -> bytes:
    try:
        return zlib.decompressobj().decompress(text, _MAX_TEXT)
    except zlib.error:
        return b""


def _chunk(name: bytes, body: bytes | memoryview) -> bytes:
    checksum = zlib.crc32(body, zlib.crc32(name))
    return b"".join((struct.pack(">L", len(body)), name, body, struct.pack(">L", checksum)))


def _first_frame(file: _File) -> Image.Image:
    width, height, left, top = struct.unpack_from(">4L", file.frame, 4)
    if left + width > file.size[0] or top + height > file.size[1]:
        raise damaged("PNG")
    header = struct.pack(">2L", width, height) + file.header[8:]
    return on_white(_load(file, header, file.frame_pixels), file.size, (left, top))


def _load(file: _File, header: bytes, pixels: list[Chunk]) -> Image.Image:
    """An image of 8 bits per channel or less."""
    if file.colours == _PALETTE and not file.palette:
        raise damaged("PNG")
    data = b"".join(
        (
            SIGNATURE,
            _chunk(b"IHDR", header),
            file.palette,
            file.transparency,
            *pixels,
            _chunk(b"IEND", b""),
        )
    )
    if file.depth == 16:
        return _load_16_bits(file, data)
    image = _open(data)
    if file.transparency and file.colours == _RGB:
        image.info["transparency"] = file.transparent
    elif file.transparency and file.colours == _GREY:
        # Pillow spreads 1, 2 and 4 bits over 0 to 255, but not this value.
        image.info["transparency"] = file.transparent[0] * (255 // ((1 << file.depth) - 1))
    return image


def _open(data: bytes, raw_mode: str = "") -> Image.Image:
    """Loads a file; `raw_mode` tells Pillow to take its samples for others."""
    with decoding("PNG"):
        image = Image.open(io.BytesIO(data), formats=("PNG",))
        if raw_mode:
            image.tile = [tile._replace(args=raw_mode) for tile in image.tile]
        image.load()
    return image


def _load_16_bits(file: _File, data: bytes) -> Image.Image:
    """Pillow only has 16 bits of grey. Of other colours it takes the upper or the lower bytes."""
    transparent = file.transparent
    if file.colours == _GREY:
        sources = [_open(data)]
    elif file.colours == _GREY_ALPHA:
        sources = [_open(data, "RGBA")]  # a pixel has as many bytes
    else:
        mode = "RGBA" if file.colours == _RGBA else "RGB"
        sources = [_open(data, f"{mode};16B"), _open(data, f"{mode};16L")]

    def convert(*rows: NDArray[np.uint8] | NDArray[np.uint16]) -> Pixels:
        values: NDArray[np.uint16]
        if file.colours == _GREY:
            values = rows[0].astype(np.uint16)[..., None]
        elif file.colours == _GREY_ALPHA:
            values = np.ascontiguousarray(rows[0]).view(">u2")
        else:
            values = rows[0].astype(np.uint16) * np.uint16(256) + rows[1]
        narrowed = narrow(values)
        if transparent:
            opaque = (values != np.array(transparent, np.uint16)).any(-1, keepdims=True)
            narrowed = np.concatenate((narrowed, np.uint8(255) * opaque), -1, dtype=np.uint8)
        return narrowed[..., 0] if narrowed.shape[-1] == 1 else narrowed

    return by_bands(sources, sources[0].size, convert)
