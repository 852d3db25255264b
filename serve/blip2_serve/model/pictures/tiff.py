"""TIFF: reads the directory, drops what tells nothing of pixels, and leaves the rest to Pillow.

Samples that Pillow has no mode for (see samples.py) go through it as if they were 8-bit grey, one
pixel per byte: libtiff still undoes the compression and puts strips and tiles together.
"""

from __future__ import annotations

import contextlib
import ctypes
import io
import math
import struct
from dataclasses import dataclass

from PIL import Image, UnidentifiedImageError, _imaging

from blip2_serve.model.pictures.colours import by_bands
from blip2_serve.model.pictures.faults import (
    check_parts,
    check_size,
    cut_off,
    damaged,
    decoding,
    max_sample_bytes,
    too_large,
    unsupported,
)
from blip2_serve.model.pictures.orientation import find_orientation
from blip2_serve.model.pictures.samples import Layout

# libtiff prints each error to stderr. The handler is one for the whole process and no option of
# Pillow's, which switches off the one for warnings in the same way.
with contextlib.suppress(AttributeError, OSError):
    ctypes.CDLL(_imaging.__file__).TIFFSetErrorHandler(None)

SIGNATURES = (b"II*\0", b"MM\0*", b"II\0*", b"MM*\0", b"II+\0", b"MM\0+")

_WIDTH, _HEIGHT, _BITS, _COMPRESSION, _PHOTOMETRIC, _SAMPLES = 256, 257, 258, 259, 262, 277
_STRIP_OFFSETS, _ROWS_PER_STRIP, _STRIP_BYTES = 273, 278, 279
_TILE_WIDTH, _TILE_HEIGHT, _TILE_OFFSETS, _TILE_BYTES = 322, 323, 324, 325
_PLANAR, _PREDICTOR, _COLOUR_MAP, _EXTRA_SAMPLES, _SAMPLE_FORMAT = 284, 317, 320, 338, 339
_ORIENTATION, _SAMPLE_MIN, _SAMPLE_MAX, _XMP = 274, 340, 341, 700

_OF_SAMPLES = {_PREDICTOR, _COLOUR_MAP, _EXTRA_SAMPLES, _SAMPLE_FORMAT, _PLANAR}
_OF_PIXELS = {
    *(_WIDTH, _HEIGHT, _BITS, _COMPRESSION, _PHOTOMETRIC, _SAMPLES),
    *(_STRIP_OFFSETS, _ROWS_PER_STRIP, _STRIP_BYTES),
    *(_TILE_WIDTH, _TILE_HEIGHT, _TILE_OFFSETS, _TILE_BYTES),
    *_OF_SAMPLES,
    *(266, 292, 293, 347, *range(512, 522), 529, 530, 531, 532),  # of single compressions
}

# None, LZW, deflate (two numbers), PackBits, LZMA, Zstandard: they only know bytes.
_OF_BYTES = {1, 5, 8, 32946, 32773, 34925, 50000}

_WHITE_IS_ZERO, _BLACK_IS_ZERO, _RGB, _CMYK = 0, 1, 2, 5
_COLOURS = {_WHITE_IS_ZERO: 1, _BLACK_IS_ZERO: 1, _RGB: 3, _CMYK: 4}

_LOOKED_AT = {*_OF_PIXELS, _ORIENTATION, _SAMPLE_MIN, _SAMPLE_MAX, _XMP}

_MAX_SAMPLES = 32

_LONG = 4
_OF_BIG_TIFF = {16, 17}
# Bytes and letter of `struct`, by TIFF's number of a type.
_TYPES = {
    1: (1, "B"),
    2: (1, "B"),
    3: (2, "H"),
    4: (4, "L"),
    6: (1, "b"),
    7: (1, "B"),
    8: (2, "h"),
    9: (4, "l"),
    11: (4, "f"),
    12: (8, "d"),
    13: (4, "L"),
    16: (8, "Q"),
    17: (8, "q"),
}


@dataclass(frozen=True)
class _Value:
    type: int
    raw: bytes


@dataclass(frozen=True)
class _Directory:
    """The first directory of a file: those tags that are looked at."""

    order: str  # "<" or ">"
    tags: dict[int, _Value]

    def numbers(self, tag: int) -> tuple[float, ...]:
        value = self.tags.get(tag)
        if value is None:
            return ()
        size, letter = _TYPES[value.type]
        return struct.unpack(f"{self.order}{len(value.raw) // size}{letter}", value.raw)

    def integers(self, tag: int) -> tuple[int, ...]:
        return tuple(int(number) for number in self.numbers(tag) if math.isfinite(number))

    def number(self, tag: int, default: int) -> int:
        return (*self.integers(tag)[:1], default)[0]

    def value(self, *numbers: int) -> _Value:
        """Numbers as they stand in a file like this one."""
        try:
            return _Value(_LONG, struct.pack(f"{self.order}{len(numbers)}L", *numbers))
        except struct.error:
            raise damaged("TIFF") from None


def decode(data: bytes) -> tuple[Image.Image, int]:
    """The first picture and its orientation."""
    directory = _read(data)
    check_size(directory.number(_WIDTH, 0), directory.number(_HEIGHT, 0))
    xmp = directory.tags.get(_XMP)
    orientation = directory.number(_ORIENTATION, 0)
    if not 1 <= orientation <= 8:
        orientation = find_orientation(xmp=xmp.raw if xmp else b"")
    layout = _layout(directory)
    image = None if layout and not layout.is_usual else _load(data, directory)
    if image is None and layout:
        image = _from_samples(data, directory, layout)
    if image is None:
        raise unsupported("TIFF images of this kind")
    return image, orientation


def _read(data: bytes) -> _Directory:
    order = "<" if data.startswith(b"II") else ">"
    big = 43 in data[2:4]
    head, entry_form = ("Q", "HHQ") if big else ("L", "HHL")
    count_form, room = ("Q", 8) if big else ("H", 4)
    entry_size = struct.calcsize(f"={entry_form}") + room
    tags: dict[int, _Value] = {}
    try:
        (start,) = struct.unpack_from(order + head, data, room)
        (count,) = struct.unpack_from(order + count_form, data, start)
        start += struct.calcsize(f"={count_form}")
        for position in range(start, min(start + count * entry_size, len(data)), entry_size):
            tag, kind, values = struct.unpack_from(order + entry_form, data, position)
            if tag in tags or kind not in _TYPES or tag not in _LOOKED_AT:
                continue
            length = values * _TYPES[kind][0]
            place = position + entry_size - room
            if length > room:
                (place,) = struct.unpack_from(order + head, data, place)
            if place + length <= len(data):
                tags[tag] = _Value(kind, data[place : place + length])
            elif tag in _OF_PIXELS:
                raise cut_off("TIFF")
    except (struct.error, OverflowError):
        raise cut_off("TIFF") from None
    directory = _Directory(order, {tag: value for tag, value in tags.items() if value.raw})
    _check(directory)
    return directory


def _check(directory: _Directory) -> None:
    width, height = directory.number(_WIDTH, 0), directory.number(_HEIGHT, 0)
    if width < 1 or height < 1:
        raise damaged("TIFF")
    for tag in (_STRIP_OFFSETS, _TILE_OFFSETS):
        check_parts(len(directory.numbers(tag)), "TIFF")
    if directory.number(_SAMPLES, 1) > _MAX_SAMPLES:
        raise unsupported(f"TIFF images of more than {_MAX_SAMPLES} channels")


def _layout(directory: _Directory) -> Layout | None:
    """How samples.py may take the pixels; None if Pillow must know the compression's own way."""
    photometric = directory.number(_PHOTOMETRIC, _WHITE_IS_ZERO)  # Pillow's default
    samples = directory.number(_SAMPLES, 1)
    bits = {*directory.integers(_BITS)} or {1}
    formats = {*directory.integers(_SAMPLE_FORMAT)[:samples]} or {1}
    colours = _COLOURS.get(photometric, samples + 1)
    if (
        directory.number(_COMPRESSION, 1) not in _OF_BYTES
        or colours > samples
        or len(bits) > 1
        or len(formats) > 1
        or directory.number(_TILE_WIDTH, 0) < 0
    ):
        return None
    extra = directory.integers(_EXTRA_SAMPLES) or ((2,) if samples == colours + 1 else ())
    extra = extra[: samples - colours]
    layout = Layout(
        order=directory.order,
        width=directory.number(_WIDTH, 0),
        height=directory.number(_HEIGHT, 0),
        bits=bits.pop(),
        format=formats.pop(),
        samples=samples,
        colours=colours,
        white_is_zero=photometric == _WHITE_IS_ZERO,
        alpha={1: "premultiplied", 2: "straight"}.get((*extra, 0)[0], ""),
        planar=directory.number(_PLANAR, 1) == 2 and samples > 1,
        predictor=directory.number(_PREDICTOR, 1),
        tile_width=directory.number(_TILE_WIDTH, 0),
        least=directory.numbers(_SAMPLE_MIN),
        most=directory.numbers(_SAMPLE_MAX),
    )
    return layout if layout.is_known else None


def _load(data: bytes, directory: _Directory) -> Image.Image | None:
    """Decodes by Pillow, which sees only the tags that pixels are made of.

    None if Pillow has no mode for these samples.
    """
    with decoding("TIFF"):
        try:
            image = Image.open(io.BytesIO(_rewrite(data, directory)), formats=("TIFF",))
        except UnidentifiedImageError:
            return None
        try:
            image.load()
        except OSError as error:
            raise (cut_off if _ends_early(data, directory) else damaged)("TIFF") from error
    return image


def _ends_early(data: bytes, directory: _Directory) -> bool:
    for offsets, sizes in ((_STRIP_OFFSETS, _STRIP_BYTES), (_TILE_OFFSETS, _TILE_BYTES)):
        pairs = zip(directory.numbers(offsets), directory.numbers(sizes), strict=False)
        if any(offset + size > len(data) for offset, size in pairs):
            return True
    return False


def _from_samples(data: bytes, directory: _Directory, layout: Layout) -> Image.Image:
    if layout.row_bytes * layout.height * layout.planes > max_sample_bytes():
        raise too_large(layout.width, layout.height)
    planes = []
    for plane in range(layout.planes):
        image = _load(data, _as_bytes(directory, layout, plane))
        if image is None:
            raise damaged("TIFF")
        planes.append(image)
    return by_bands(planes, (layout.width, layout.height), layout.to_8_bits)


def _as_bytes(directory: _Directory, layout: Layout, plane: int) -> _Directory:
    """The same data, or one plane of them, as a picture with a pixel for each byte."""
    tags = {tag: value for tag, value in directory.tags.items() if tag not in _OF_SAMPLES}
    changes = {
        _WIDTH: layout.row_bytes,
        _BITS: 8,
        _PHOTOMETRIC: _BLACK_IS_ZERO,
        _SAMPLES: 1,
    }
    if layout.tile_width:
        tile_bytes = layout.bytes_of(layout.tile_width)
        if tile_bytes * directory.number(_TILE_HEIGHT, 1) > max_sample_bytes():
            raise damaged("TIFF")
        changes[_TILE_WIDTH] = tile_bytes
    tags |= {tag: directory.value(number) for tag, number in changes.items()}
    if layout.planar:
        for tag in (_STRIP_OFFSETS, _STRIP_BYTES, _TILE_OFFSETS, _TILE_BYTES):
            value = tags.get(tag)
            if value:
                part = len(value.raw) // layout.samples
                part -= part % _TYPES[value.type][0]
                if not part:
                    raise damaged("TIFF")
                tags[tag] = _Value(value.type, value.raw[plane * part : (plane + 1) * part])
    return _Directory(directory.order, tags)


def _rewrite(data: bytes, directory: _Directory) -> bytes:
    """The file with a new directory at its end, and no longer a BigTIFF."""
    order = directory.order
    tags = {
        tag: directory.value(*directory.integers(tag)) if value.type in _OF_BIG_TIFF else value
        for tag, value in sorted(directory.tags.items())
        if tag in _OF_PIXELS
    }
    start = len(data) + len(data) % 2
    entries = [struct.pack(f"{order}H", len(tags))]
    far: list[bytes] = []
    place = start + 2 + 12 * len(tags) + 4
    for tag, value in tags.items():
        count = len(value.raw) // _TYPES[value.type][0]
        entries.append(struct.pack(f"{order}HHL", tag, value.type, count))
        if len(value.raw) <= 4:
            entries.append(value.raw.ljust(4, b"\0"))
        else:
            entries.append(struct.pack(f"{order}L", place))
            far.append(value.raw + bytes(len(value.raw) % 2))
            place += len(far[-1])
    header = (b"II*\0" if order == "<" else b"MM\0*") + struct.pack(f"{order}L", start)
    return b"".join((header, data[8:], bytes(len(data) % 2), *entries, bytes(4), *far))
