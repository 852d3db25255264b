"""Small pictures of every accepted format, and ways to break them as files break in the wild."""

from __future__ import annotations

import random
import struct
import zlib
from collections.abc import Callable
from functools import cache

import numpy as np
import pillow_heif
from PIL import Image

from support.images import encode
from support.pictures import (
    PNG_SIGNATURE,
    chunk,
    chunks,
    exif,
    jpeg_with,
    orientation_tag,
    png,
    png_of,
    png_with,
    segment,
    tiff,
)

WIDTH, HEIGHT = 24, 16

Seeds = dict[str, list[bytes]]


@cache
def seeds() -> Seeds:
    """Intact files by format, of many modes and depths each."""
    pillow_heif.register_heif_opener()
    rng = np.random.default_rng(16)
    rgb = Image.fromarray(rng.integers(0, 256, (HEIGHT, WIDTH, 3), dtype=np.uint8))
    smooth = rgb.resize((4, 3)).resize((WIDTH, HEIGHT))
    rgba = rgb.copy()
    rgba.putalpha(rgb.getchannel("G"))
    grey, palette = rgb.convert("L"), rgb.quantize(16)
    frames = [rgb.rotate(angle) for angle in (0, 90, 180)]
    tags = exif(orientation_tag(6))
    wide = rng.integers(0, 65536, (HEIGHT, WIDTH, 3)).astype(np.uint16)
    jpeg = encode(smooth, "JPEG", exif=tags)
    animated = {"save_all": True, "append_images": frames[1:]}
    return {
        "JPEG": [
            jpeg,
            encode(rgb, "JPEG", progressive=True, subsampling=2),
            encode(grey, "JPEG", restart_marker_rows=1),
            encode(smooth.convert("CMYK"), "JPEG"),
            jpeg_with(encode(grey, "JPEG"), segment(0xE2, b"ICC_PROFILE\0\1\1x"), jfif=False),
            encode(smooth, "MPO", save_all=True, append_images=[rgb]),
        ],
        "PNG": [
            encode(rgb),
            encode(rgba),
            encode(grey.convert("1")),
            encode(palette, transparency=bytes(range(0, 256, 16))),
            png_with(encode(grey, transparency=77), chunk(b"eXIf", tags)),
            png_of(wide[..., 0], 0, 16, chunk(b"tRNS", b"\1\2")),
            png_of(wide, 2, 16),
            png_of(wide[..., :2], 4, 16),
            encode(rgb, **animated),
            encode(rgba, default_image=True, **animated),
            png_with(encode(rgb), chunk(b"iTXt", b"XML:com.adobe.xmp\0\0\0\0\0tiff:Orientation>3")),
        ],
        "WEBP": [
            encode(smooth, "WEBP", quality=50),
            encode(rgba, "WEBP", lossless=True),
            encode(rgba, "WEBP", exif=b"Exif\0\0" + tags, quality=30),
            encode(rgb, "WEBP", **animated),
        ],
        "AVIF": [
            encode(smooth, "AVIF", quality=30, exif=tags),
            encode(rgba.resize((16, 16)), "AVIF", quality=30),
            encode(smooth, "AVIF", quality=30, **animated),
        ],
        "HEIF": [
            encode(smooth, "HEIF", quality=30, exif=b"Exif\0\0" + tags),
            encode(rgba.resize((16, 16)), "HEIF", quality=30),
            encode(smooth.convert("L"), "HEIF", quality=30),
        ],
        "GIF": [
            encode(palette, "GIF", comment=b"hello"),
            encode(palette, "GIF", transparency=3, interlace=1),
            encode(rgb, "GIF", **animated),
        ],
        "BMP": [
            encode(rgb, "BMP"),
            encode(palette, "BMP"),
            encode(rgba, "BMP"),
            encode(grey.convert("1"), "BMP"),
        ],
        "TIFF": [
            *(
                encode(rgb, "TIFF", compression=name)
                for name in ("raw", "tiff_lzw", "tiff_adobe_deflate", "packbits", "jpeg", "zstd")
            ),
            encode(grey.convert("1"), "TIFF", compression="group4"),
            encode(palette, "TIFF"),
            encode(smooth.convert("CMYK"), "TIFF"),
            encode(rgba, "TIFF"),
            tiff(wide, order=">", deflate=True, predictor=2, rows_per_strip=5),
            tiff(wide[..., 0].astype(np.int16) - 9, photometric=0),
            tiff(wide[..., 0] >> 4, 12),
            tiff((wide / 65535).astype(np.float32), deflate=True, predictor=3, tile=16),
            tiff(wide.astype(np.uint32), planar=True, big=True, tags={340: [5], 341: [60000]}),
        ],
    }


# -- mutations: each takes a file to break, another to borrow from, and a source of chance

Mutation = Callable[[bytes, bytes, random.Random], bytes]


def flip_bits(data: bytes, _: bytes, chance: random.Random) -> bytes:
    broken = bytearray(data)
    for _bit in range(chance.choice((1, 1, 2, 8, 64))):
        broken[chance.randrange(len(broken))] ^= 1 << chance.randrange(8)
    return bytes(broken)


def flip_in_the_header(data: bytes, _: bytes, chance: random.Random) -> bytes:
    broken = bytearray(data)
    for _byte in range(chance.choice((1, 2, 4))):
        place = chance.randrange(min(96, len(broken)))
        broken[place] = chance.choice((0, 1, 0x7F, 0x80, 0xFF, chance.randrange(256)))
    return bytes(broken)


def set_a_number(data: bytes, _: bytes, chance: random.Random) -> bytes:
    """A length, an offset or a size becomes an extreme one."""
    form = chance.choice(("<H", ">H", "<L", ">L"))
    bits = 16 if form[1] == "H" else 32
    number = chance.choice((0, 1, 2, 2**bits - 1, 2 ** (bits - 1), 2 ** (bits - 1) - 1, 9000))
    place = chance.randrange(max(1, len(data) - 4))
    return data[:place] + struct.pack(form, number) + data[place + bits // 8 :]


def cut(data: bytes, _: bytes, chance: random.Random) -> bytes:
    return data[: chance.randrange(len(data))]


def cut_the_end(data: bytes, _: bytes, chance: random.Random) -> bytes:
    return data[: -chance.randint(1, min(24, len(data)))]


def remove(data: bytes, _: bytes, chance: random.Random) -> bytes:
    start = chance.randrange(len(data))
    return data[:start] + data[start + chance.choice((1, 2, 4, 13, 100)) :]


def insert(data: bytes, _: bytes, chance: random.Random) -> bytes:
    place = chance.randrange(len(data))
    return data[:place] + chance.randbytes(chance.choice((1, 2, 4, 100))) + data[place:]


def repeat(data: bytes, _: bytes, chance: random.Random) -> bytes:
    start = chance.randrange(len(data))
    end = start + chance.randrange(1, 200)
    return data[:end] + data[start:end] + data[end:]


def swap_headers(data: bytes, other: bytes, chance: random.Random) -> bytes:
    length = chance.choice((4, 12, 20, 33, 64, 200))
    return other[:length] + data[length:]


def splice(data: bytes, other: bytes, chance: random.Random) -> bytes:
    return data[: chance.randrange(len(data))] + other[chance.randrange(len(other)) :]


def operate_on_parts(data: bytes, other: bytes, chance: random.Random) -> bytes:
    """Moves, repeats, drops, changes or borrows whole chunks or segments; sums are right again."""
    known = [container for container in _CONTAINERS if container[0](data)]
    if not known:
        return flip_bits(data, other, chance)
    is_theirs, split, join = known[0]
    parts = split(data)
    borrowed = split(other) if is_theirs(other) else []
    for _step in range(chance.choice((1, 1, 2, 5))):
        if not parts:
            break
        index = chance.randrange(len(parts))
        name, body = parts[index]
        action = chance.randrange(7)
        if action == 0:
            del parts[index]
        elif action == 1:
            parts.insert(chance.randrange(len(parts) + 1), parts[index])
        elif action == 2:
            parts.insert(chance.randrange(len(parts)), parts.pop(index))
        elif action == 3 and borrowed:
            parts.insert(index, chance.choice(borrowed))
        elif action == 4 and body:
            parts[index] = name, cut(body, b"", chance)
        elif action == 5 and body:
            parts[index] = name, flip_bits(body, b"", chance)
        elif borrowed:
            parts[index] = chance.choice(borrowed)[0], body
    return join(parts)


Parts = list[tuple[bytes, bytes]]


def _join_png(parts: Parts) -> bytes:
    return png(*(chunk(name, body) for name, body in parts))


def _split_jpeg(data: bytes) -> Parts:
    """Segments before the scan; what follows is the body of a last part without a name."""
    parts: Parts = []
    position = 2
    while data[position : position + 1] == b"\xff" and data[position + 1 :][:1] not in b"\xda":
        end = position + 2 + int.from_bytes(data[position + 2 : position + 4], "big")
        parts.append((data[position : position + 2], data[position + 4 : end]))
        position = end
    return [*parts, (b"", data[position:])]


def _join_jpeg(parts: Parts) -> bytes:
    whole = (
        name + struct.pack(">H", min(len(body) + 2, 65535)) + body if name else body
        for name, body in parts
    )
    return b"\xff\xd8" + b"".join(whole)


def _split_riff(data: bytes) -> Parts:
    parts: Parts = []
    position = 12
    while position + 8 <= len(data):
        length = int.from_bytes(data[position + 4 : position + 8], "little")
        parts.append((data[position : position + 4], data[position + 8 : position + 8 + length]))
        position += 8 + length + length % 2
    return parts


def _join_riff(parts: Parts) -> bytes:
    body = b"WEBP" + b"".join(
        name + struct.pack("<L", len(body)) + body + bytes(len(body) % 2) for name, body in parts
    )
    return b"RIFF" + struct.pack("<L", len(body)) + body


def _split_tiff(data: bytes) -> Parts:
    """The entries of the first directory, between what is before and after them."""
    start = int.from_bytes(data[4:8], "little")
    end = start + 2 + 12 * int.from_bytes(data[start : start + 2], "little")
    entries = [(b"", data[i : i + 12]) for i in range(start + 2, min(end, len(data)), 12)]
    return [(b"", data[: start + 2]), *entries, (b"", data[end:])]


def _join_tiff(parts: Parts) -> bytes:
    return b"".join(body for _, body in parts)


_CONTAINERS: tuple[
    tuple[Callable[[bytes], bool], Callable[[bytes], Parts], Callable[[Parts], bytes]], ...
] = (
    (lambda d: d.startswith(PNG_SIGNATURE), lambda d: [*chunks(d)], _join_png),
    (lambda d: d.startswith(b"\xff\xd8"), _split_jpeg, _join_jpeg),
    (lambda d: d[:4] == b"RIFF", _split_riff, _join_riff),
    (lambda d: d[:4] == b"II*\0", _split_tiff, _join_tiff),
)


def change_inflated(data: bytes, other: bytes, chance: random.Random) -> bytes:
    """Changes what a PNG's data inflate to, such as the filters of rows."""
    if not data.startswith(PNG_SIGNATURE):
        return set_a_number(data, other, chance)
    parts = [*chunks(data)]
    for index, (name, body) in enumerate(parts):
        if name == b"IDAT":
            try:
                whole = zlib.decompressobj().decompress(body, 1 << 20)
            except zlib.error:
                break
            parts[index] = name, zlib.compress(chance.choice((flip_bits, cut))(whole, b"", chance))
            break
    return _join_png(parts)


MUTATIONS: tuple[Mutation, ...] = (
    flip_bits,
    flip_in_the_header,
    set_a_number,
    cut,
    cut_the_end,
    remove,
    insert,
    repeat,
    swap_headers,
    splice,
    operate_on_parts,
    operate_on_parts,
    change_inflated,
)


def mutated(name: str, seed: int) -> bytes:
    """The same file for the same format and seed."""
    chance = random.Random(f"{name} {seed}")
    files = seeds()[name]
    data = chance.choice(files)
    for _step in range(chance.choice((1, 1, 1, 2, 3))):
        # Now and then the other file is of another format.
        others = files if chance.random() < 0.8 else seeds()[chance.choice([*seeds()])]
        data = chance.choice(MUTATIONS)(data, chance.choice(others), chance) or b"\0"
    return data
