"""Small files that ask a decoder for much: time, memory, or a long walk through their structure."""

from __future__ import annotations

import io
import struct
import zlib
from collections.abc import Callable

import numpy as np
import pillow_heif
from PIL import Image

from support.images import encode
from support.pictures import (
    chunk,
    chunks,
    exif,
    jpeg_with,
    orientation_tag,
    png,
    png_with,
    segment,
    tiff,
)

SMALL = Image.new("RGB", (64, 48), "red")
MOST = 65_535


def header_of(width: int, height: int, depth: int = 8, colours: int = 0) -> bytes:
    return chunk(b"IHDR", struct.pack(">2L5B", width, height, depth, colours, 0, 0, 0))


def flat(width: int, height: int, name: bytes = b"") -> bytes:
    """A grey PNG of zeros; `name` makes it another file."""
    deflate = zlib.compressobj(9)
    row = bytes(1 + width)
    data = b"".join(deflate.compress(row) for _ in range(height)) + deflate.flush()
    text = chunk(b"tEXt", b"name\0" + name)
    return png(header_of(width, height), text, chunk(b"IDAT", data), chunk(b"IEND"))


def png_claiming(width: int, height: int) -> bytes:
    """The head of a large image, and the data of a small one."""
    parts = [*chunks(encode(SMALL))]
    return png(header_of(width, height, colours=2), *(chunk(*part) for part in parts[1:]))


def inflating(name: bytes, head: bytes, size: int = 1 << 28) -> bytes:
    """A PNG with a chunk that inflates to a quarter of a gigabyte."""
    deflate = zlib.compressobj(9)
    block = bytes(1 << 20)
    body = b"".join(deflate.compress(block) for _ in range(size >> 20)) + deflate.flush()
    return png_with(encode(SMALL), chunk(name, head + body))


def jpeg_claiming(width: int, height: int) -> bytes:
    data = bytearray(encode(SMALL, "JPEG"))
    frame = data.index(b"\xff\xc0")
    data[frame + 5 : frame + 9] = struct.pack(">2H", height, width)
    return bytes(data)


def many_scans(count: int = 4000) -> bytes:
    """A progressive JPEG that repeats one of its scans: each goes through the whole image."""
    image = Image.new("L", (5000, 5000))
    data = encode(image, "JPEG", progressive=True, quality=50)
    scans = [place for place in range(len(data)) if data.startswith(b"\xff\xda", place)]
    last = data[scans[-1] : -2]
    return data[:-2] + last * count + data[-2:]


def nested_directories(count: int) -> bytes:
    """A TIFF whose directories follow each other, thousands of them."""
    data = tiff(np.zeros((16, 16), np.uint8))
    first = int.from_bytes(data[4:8], "little")
    entries = int.from_bytes(data[first : first + 2], "little")
    directory = data[first : first + 2 + 12 * entries]
    length = len(directory) + 4
    begin = len(data)
    more = b"".join(
        directory + struct.pack("<L", begin + (number + 1) * length) for number in range(count)
    )
    link = first + len(directory)
    return data[:link] + struct.pack("<L", begin) + data[link + 4 :] + more[:-4] + bytes(4)


def looping_directory() -> bytes:
    """A TIFF whose only directory is its own successor."""
    data = tiff(np.zeros((16, 16), np.uint8))
    first = int.from_bytes(data[4:8], "little")
    link = first + 2 + 12 * int.from_bytes(data[first : first + 2], "little")
    return data[:link] + struct.pack("<L", first) + data[link + 4 :]


def exif_that_loops() -> bytes:
    """A JPEG whose metadata point to themselves, and claim a value of 4 GB."""
    tags = exif((0x8769, 4, 1, struct.pack("<L", 8)), (0x9286, 7, 0xFFFFFFF0, bytes(4)))
    return jpeg_with(encode(SMALL, "JPEG"), segment(0xE1, b"Exif\0\0" + tags))


def colour_profile_in_parts() -> bytes:
    """A JPEG with a colour profile in 255 full segments, of which each claims to be one of many."""
    parts = (segment(0xE2, b"ICC_PROFILE\0" + bytes([i, 255]) + bytes(65_000)) for i in range(255))
    return jpeg_with(encode(SMALL, "JPEG"), *parts)


def frames(format: str, count: int) -> bytes:
    """An animation of many frames of one pixel each."""
    dark, light = (Image.new("RGB", (1, 1), colour) for colour in ("black", "white"))
    others = [light, dark] * (count // 2)
    return encode(dark, format, save_all=True, append_images=others[:-1], lossless=True)


def endless_gif() -> bytes:
    """A GIF without an end: its frame begins again and again."""
    data = encode(Image.new("P", (2, 2)), "GIF")
    frame = data[data.index(b",") : -1]
    return data[:-1] + frame * 50_000


def heif_claiming(width: int, height: int) -> bytes:
    pillow_heif.register_heif_opener()
    data = bytearray(encode(SMALL, "HEIF", quality=30))
    place = data.index(b"ispe") + 8
    data[place : place + 8] = struct.pack(">2L", width, height)
    return bytes(data)


def avif_claiming(width: int, height: int) -> bytes:
    data = bytearray(encode(SMALL, "AVIF", quality=30))
    place = data.index(b"ispe") + 8
    data[place : place + 8] = struct.pack(">2L", width, height)
    return bytes(data)


def webp_claiming() -> bytes:
    """Lossless, 16,384 x 16,384, of almost nothing."""
    stream = io.BytesIO()
    Image.new("RGB", (4, 4)).save(stream, "WEBP", lossless=True)
    data = bytearray(stream.getvalue())
    place = data.index(b"VP8L") + 9
    bits = int.from_bytes(data[place : place + 4], "little")
    data[place : place + 4] = (bits | 0x0FFFFFFF).to_bytes(4, "little")
    return bytes(data)


BOMBS: dict[str, Callable[[], bytes]] = {
    "a PNG that claims 65,535 x 65,535": lambda: png_claiming(MOST, MOST),
    "a PNG that claims 2^31 - 1 squared": lambda: png_claiming(2**31 - 1, 2**31 - 1),
    "a JPEG that claims 65,535 x 65,535": lambda: jpeg_claiming(MOST, MOST),
    "a HEIC that claims 65,535 x 65,535": lambda: heif_claiming(MOST, MOST),
    "an AVIF that claims 65,535 x 65,535": lambda: avif_claiming(MOST, MOST),
    "a WebP that claims 16,384 x 16,384": webp_claiming,
    "a flat PNG of 20,000 x 20,000": lambda: encode(Image.new("1", (20_000, 20_000))),
    "a PNG of 1 x 1,000,000": lambda: flat(1, 1_000_000),
    "a PNG of 1,000,000 x 1": lambda: flat(1_000_000, 1),
    "a PNG with a colour profile of 256 MB": lambda: inflating(b"iCCP", b"icc\0\0"),
    "a PNG with a text of 256 MB": lambda: inflating(b"zTXt", b"Comment\0\0"),
    "a PNG with XMP of 256 MB": lambda: inflating(b"iTXt", b"XML:com.adobe.xmp\0\1\0\0\0"),
    "a JPEG of 4,000 scans": many_scans,
    "a JPEG with a colour profile of 16 MB": colour_profile_in_parts,
    "a JPEG whose metadata loop": exif_that_loops,
    "a TIFF of 50,000 directories": lambda: nested_directories(50_000),
    "a TIFF whose directory loops": looping_directory,
    "a TIFF of a tag with 4 billion values": lambda: tiff(
        np.zeros((16, 16), np.uint8), tags={34675: [0] * 9}
    ).replace(struct.pack("<HHL", 34675, 4, 9), struct.pack("<HHL", 34675, 4, 0xFFFFFFFF)),
    "a GIF of 50,000 frames": endless_gif,
    "a PNG of 2,000 frames": lambda: frames("PNG", 2000),
    "a WebP of 2,000 frames": lambda: frames("WEBP", 2000),
    "a JPEG with 5,000 orientations": lambda: jpeg_with(
        encode(SMALL, "JPEG"),
        segment(0xE1, b"Exif\0\0" + exif(*(orientation_tag(6) for _ in range(5_000)))),
    ),
}
