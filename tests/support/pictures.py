"""Picture files that Pillow does not write: chunk by chunk, segment by segment, tag by tag."""

from __future__ import annotations

import struct
import zlib
from collections.abc import Iterator, Sequence
from itertools import accumulate
from typing import Any

import numpy as np
from numpy.typing import NDArray

PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"
ORIENTATION = 274

# -- PNG -------------------------------------------------------------------------------------------

Chunk = tuple[bytes, bytes]


def chunk(name: bytes, body: bytes = b"", *, checksum: int | None = None) -> bytes:
    if checksum is None:
        checksum = zlib.crc32(name + body)
    return struct.pack(">L", len(body)) + name + body + struct.pack(">L", checksum)


def chunks(data: bytes) -> Iterator[Chunk]:
    """Name and body of each whole chunk of a PNG."""
    position = len(PNG_SIGNATURE)
    while position + 12 <= len(data):
        (length,) = struct.unpack_from(">L", data, position)
        yield data[position + 4 : position + 8], data[position + 8 : position + 8 + length]
        position += 12 + length


def png(*parts: bytes) -> bytes:
    return PNG_SIGNATURE + b"".join(parts)


def png_with(data: bytes, *extra: bytes, before: bytes = b"IDAT") -> bytes:
    """A PNG with more (whole) chunks before the first one of a name."""
    parts: list[bytes] = []
    waiting = [*extra]
    for name, body in chunks(data):
        if name == before:
            parts += waiting
            waiting = []
        parts.append(chunk(name, body))
    assert not waiting
    return png(*parts)


def png_of(values: NDArray[Any], colours: int, depth: int, *extra: bytes) -> bytes:
    """A PNG of [height, width] or [height, width, channels] samples, without filters."""
    height, width = values.shape[:2]
    header = struct.pack(">2L5B", width, height, depth, colours, 0, 0, 0)
    return png(
        chunk(b"IHDR", header), *extra, chunk(b"IDAT", scanlines(values, depth)), chunk(b"IEND")
    )


def scanlines(values: NDArray[Any], depth: int) -> bytes:
    rows = packed(values.reshape(len(values), -1), depth, ">")
    return zlib.compress(b"".join(b"\0" + row for row in rows))


def packed(rows: NDArray[Any], depth: int, order: str) -> list[bytes]:
    """Each row's bytes; samples within bytes begin at the highest bit."""
    if depth % 8 == 0 and depth != 24:
        kind = rows.dtype.kind if rows.dtype.kind in "if" else "u"
        return [row.astype(f"{order}{kind}{depth // 8}").tobytes() for row in rows]
    bits = (rows.astype(np.int64)[..., None] >> np.arange(depth - 1, -1, -1)) & 1
    whole = [np.packbits(row.astype(np.uint8)).tobytes() for row in bits.reshape(len(rows), -1)]
    if depth == 24 and order == "<":
        whole = [np.frombuffer(w, np.uint8).reshape(-1, 3)[:, ::-1].tobytes() for w in whole]
    return whole


# -- EXIF and JPEG ---------------------------------------------------------------------------------


def exif(*tags: tuple[int, int, int, bytes], order: str = "<") -> bytes:
    """A TIFF structure with (tag, type, count, 4 bytes of value or offset) entries."""
    head = {"<": b"II*\0", ">": b"MM\0*"}[order] + struct.pack(f"{order}L", 8)
    entries = b"".join(
        struct.pack(f"{order}HHL", tag, kind, count) + value for tag, kind, count, value in tags
    )
    return head + struct.pack(f"{order}H", len(tags)) + entries + bytes(4)


def orientation_tag(orientation: int, order: str = "<") -> tuple[int, int, int, bytes]:
    return ORIENTATION, 3, 1, struct.pack(f"{order}HH", orientation, 0)


def segment(marker: int, body: bytes) -> bytes:
    return struct.pack(">BBH", 0xFF, marker, len(body) + 2) + body


def jpeg_with(data: bytes, *segments: bytes, jfif: bool = True) -> bytes:
    """A JPEG with more segments after JFIF's (as Pillow writes it), or in its place."""
    assert data[2:4] == b"\xff\xe0"
    end = 4 + int.from_bytes(data[4:6], "big")
    return data[: end if jfif else 2] + b"".join(segments) + data[end:]


# -- TIFF ------------------------------------------------------------------------------------------


def tiff(
    values: NDArray[Any],
    depth: int = 0,
    *,
    photometric: int = 1,
    order: str = "<",
    rows_per_strip: int = 0,
    deflate: bool = False,
    big: bool = False,
    planar: bool = False,
    tile: int = 0,
    predictor: int = 1,
    tags: dict[int, Sequence[float]] | None = None,
    kinds: dict[int, int] | None = None,
) -> bytes:
    """A TIFF of [height, width] or [height, width, samples] values.

    The values' dtype gives the sample format and, unless `depth` does, the bits. `tags` are more
    tags, as rationals of whatever TIFF type `kinds` names (else floats or longs).
    """
    if values.ndim == 2:
        values = values[..., None]
    height, width, samples = values.shape
    depth = depth or 8 * values.dtype.itemsize
    planes = [values[..., i : i + 1] for i in range(samples)] if planar else [values]
    parts: list[bytes] = []
    for plane in planes:
        parts += _tiles(plane, tile) if tile else _strips(plane, rows_per_strip or height)
    parts = [
        b"".join(packed(_predicted(part, predictor, depth, order), depth, order)) for part in parts
    ]
    if deflate:
        parts = [zlib.compress(part) for part in parts]
    sample_format = {"u": 1, "b": 1, "i": 2, "f": 3}[values.dtype.kind]
    offsets, sizes = (324, 325) if tile else (273, 279)
    start = 16 if big else 8
    places = [*accumulate((len(part) for part in parts[:-1]), initial=start)]
    entries: dict[int, Sequence[float]] = {
        256: [width],
        257: [height],
        258: [depth] * samples,
        259: [8 if deflate else 1],
        262: [photometric],
        offsets: places,
        277: [samples],
        sizes: [*map(len, parts)],
        **({322: [tile], 323: [tile]} if tile else {278: [rows_per_strip or height]}),
        **({284: [2]} if planar else {}),
        **({317: [predictor]} if predictor != 1 else {}),
        339: [sample_format] * samples,
        **(tags or {}),
    }
    return _assemble(parts, entries, kinds or {}, order, big)


def _strips(plane: NDArray[Any], rows: int) -> list[NDArray[Any]]:
    return [plane[top : top + rows] for top in range(0, len(plane), rows)]


def _tiles(plane: NDArray[Any], tile: int) -> list[NDArray[Any]]:
    height, width = plane.shape[:2]
    padded = np.pad(plane, ((0, -height % tile), (0, -width % tile), (0, 0)))
    return [
        padded[top : top + tile, left : left + tile]
        for top in range(0, height, tile)
        for left in range(0, width, tile)
    ]


def _predicted(part: NDArray[Any], predictor: int, depth: int, order: str) -> NDArray[Any]:
    """Rows of what is stored: [rows, numbers]."""
    rows = len(part)
    if predictor == 2:
        whole = np.ascontiguousarray(part).view(f"u{depth // 8}")
        return np.diff(whole, axis=1, prepend=whole.dtype.type(0)).reshape(rows, -1)
    if predictor == 3:
        samples, size = part.shape[2], depth // 8
        numbers = part.reshape(rows, -1).astype(f">f{size}").view(np.uint8)
        by_byte = numbers.reshape(rows, -1, size).swapaxes(1, 2).reshape(rows, -1, samples)
        differences = np.diff(by_byte, axis=1, prepend=np.uint8(0)).reshape(rows, -1)
        return np.ascontiguousarray(differences).view(f"{order}u{size}").astype(f"u{size}")
    return part.reshape(rows, -1)


def _assemble(
    parts: list[bytes],
    entries: dict[int, Sequence[float]],
    kinds: dict[int, int],
    order: str,
    big: bool,
) -> bytes:
    letters = {2: "B", 3: "H", 4: "L", 6: "b", 8: "h", 9: "l", 11: "f", 12: "d"}
    data = b"".join(parts)
    data += bytes(len(data) % 2)
    room, form = (8, "HHQ") if big else (4, "HHL")
    start = (16 if big else 8) + len(data)
    lines, far = b"", b""
    place = start + (8 if big else 2) + (20 if big else 12) * len(entries) + room
    for tag, numbers in sorted(entries.items()):
        kind = kinds.get(tag, 4 if all(isinstance(n, int) for n in numbers) else 12)
        raw = struct.pack(f"{order}{len(numbers)}{letters[kind]}", *numbers)
        lines += struct.pack(order + form, tag, kind, len(numbers))
        if len(raw) <= room:
            lines += raw.ljust(room, b"\0")
        else:
            lines += struct.pack(f"{order}{'Q' if big else 'L'}", place + len(far))
            far += raw + bytes(len(raw) % 2)
    mark = b"II" if order == "<" else b"MM"
    head = (
        mark + struct.pack(f"{order}HHHQ", 43, 8, 0, start)
        if big
        else mark + struct.pack(f"{order}HL", 42, start)
    )
    count = struct.pack(f"{order}{'Q' if big else 'H'}", len(entries))
    return head + data + count + lines + bytes(room) + far
