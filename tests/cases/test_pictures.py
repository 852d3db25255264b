"""Pictures that public bug reports are about, drawn anew, and what is right for each."""

from __future__ import annotations

import struct
import zlib
from functools import partial

import numpy as np
import pytest
from PIL import Image, ImageDraw

from blip2_serve.errors import InvalidImage
from blip2_serve.model.processor import ImageProcessor
from blip2_serve.model.source import DEMO_FOLDER
from support.images import encode
from support.pictures import (
    chunk,
    exif,
    jpeg_with,
    orientation_tag,
    png_of,
    png_with,
    segment,
    tiff,
)

SIDE = 48


def pixels(data: bytes) -> list[int]:
    loaded = ImageProcessor.load(DEMO_FOLDER)
    own = ImageProcessor((SIDE, SIDE), loaded.mean, loaded.std, loaded.rescale, loaded.resample)
    return own.pixels(data).tolist()


def picture() -> Image.Image:
    """No two of its eight orientations look the same."""
    image = Image.new("RGB", (SIDE, SIDE), (240, 240, 230))
    draw = ImageDraw.Draw(image)
    draw.rectangle((4, 4, 28, 14), fill=(200, 30, 30))
    draw.ellipse((30, 20, 44, 44), fill=(30, 60, 190))
    return image


PLAIN = encode(picture())
JPEG = encode(picture(), "JPEG", quality=95)
MEGABYTES = zlib.compress(b"a" * 3_000_000)
GARBAGE = b"not what a TIFF begins with"


def webp_with(*extra: tuple[bytes, bytes]) -> bytes:
    """A lossless WebP with chunks after its pixels."""
    plain = encode(picture(), "WEBP", lossless=True)
    flags = 0b1000 if any(name == b"EXIF" for name, _ in extra) else 0
    canvas = bytes((flags, 0, 0, 0)) + 2 * (SIDE - 1).to_bytes(3, "little")
    body = b"WEBPVP8X" + struct.pack("<L", 10) + canvas + plain[12:]
    for name, data in extra:
        body += name + struct.pack("<L", len(data)) + data + bytes(len(data) % 2)
    return b"RIFF" + struct.pack("<L", len(body)) + body


def without_end(data: bytes) -> bytes:
    assert data.endswith(b"\xff\xd9")
    return data[:-2]


with_chunk = partial(png_with, PLAIN)

SAME_AS_PLAIN = {
    "zTXt of 3 MB (Pillow #8363)": with_chunk(chunk(b"zTXt", b"workflow\0\0" + MEGABYTES)),
    "zTXt of 3 MB after the pixels (Pillow #2445)": with_chunk(
        chunk(b"zTXt", b"workflow\0\0" + MEGABYTES), before=b"IEND"
    ),
    "iTXt of 3 MB (LLaMA-Factory #6300)": with_chunk(
        chunk(b"iTXt", b"prompt\0\1\0\0\0" + MEGABYTES)
    ),
    "70 texts of 1 MB": with_chunk(
        *70 * [chunk(b"zTXt", b"text\0\0" + zlib.compress(bytes(1 << 20)))]
    ),
    "XMP of 3 MB": with_chunk(chunk(b"iTXt", b"XML:com.adobe.xmp\0\1\0\0\0" + MEGABYTES)),
    "ICC profile of 3 MB": with_chunk(chunk(b"iCCP", b"profile\0\0" + MEGABYTES)),
    "ICC profile by an unknown method": with_chunk(chunk(b"iCCP", b"profile\0\x07" + MEGABYTES)),
    "EXIF is garbage (Pillow #5528)": with_chunk(chunk(b"eXIf", GARBAGE)),
    "EXIF is empty": with_chunk(chunk(b"eXIf", b"")),
    "EXIF as ImageMagick's text is garbage": with_chunk(
        chunk(b"tEXt", b"Raw profile type exif\0\nexif\n  9\n4578zz")
    ),
    "text with a wrong CRC (Pillow #4472)": with_chunk(
        chunk(b"tEXt", b"Comment\0hello", checksum=1)
    ),
    "EXIF with a wrong CRC (Pillow #5631)": with_chunk(
        chunk(b"eXIf", exif(orientation_tag(6)), checksum=1)
    ),
    "transparency with a wrong CRC": with_chunk(
        chunk(b"tRNS", struct.pack(">3H", 240, 240, 230), checksum=1)
    ),
    "chunks shorter than they may be": with_chunk(
        *(chunk(name, b"\1") for name in (b"gAMA", b"cHRM", b"pHYs", b"tRNS", b"acTL", b"fcTL"))
    ),
    "a chunk of an unknown kind": with_chunk(chunk(b"quUx", b"?")),
    "gamma": with_chunk(chunk(b"gAMA", struct.pack(">L", 100_000))),
    "no IEND": PLAIN[:-12],
    "garbage after IEND": PLAIN + GARBAGE,
    "text cut off after the pixels": with_chunk(chunk(b"tEXt", bytes(99)), before=b"IEND")[:-50],
    "WebP whose EXIF is garbage": webp_with((b"EXIF", GARBAGE)),
    "WebP whose EXIF is empty": webp_with((b"EXIF", b"")),
    "WebP with an unknown chunk": webp_with((b"quux", b"?")),
    "WebP cut off in its EXIF": webp_with((b"EXIF", bytes(99)))[:-50],
    "WebP with garbage at its end": webp_with((b"EXIF", GARBAGE)) + GARBAGE,
}


@pytest.mark.parametrize("data", SAME_AS_PLAIN.values(), ids=SAME_AS_PLAIN.keys())
def test_metadata_change_nothing(data: bytes) -> None:
    assert pixels(data) == pixels(PLAIN)


EXIF = b"Exif\0\0"
SAME_AS_JPEG = {
    "density and garbage for EXIF (Pillow #4852)": jpeg_with(
        encode(picture(), "JPEG", quality=95, dpi=(72, 72)), segment(0xE1, EXIF + GARBAGE)
    ),
    "garbage for EXIF (Pillow #8348)": jpeg_with(JPEG, segment(0xE1, EXIF + GARBAGE)),
    "EXIF is empty": jpeg_with(JPEG, segment(0xE1, EXIF)),
    "EXIF begins nowhere": jpeg_with(JPEG, segment(0xE1, EXIF + b"II*\0\xff\xff\xff\xff")),
    "ICC profile of one byte": jpeg_with(JPEG, segment(0xE2, b"ICC_PROFILE\0")),
    "Adobe's segment is short": jpeg_with(JPEG, segment(0xEE, b"Adobe")),
    "JFIF's segment is short": jpeg_with(JPEG, segment(0xE0, b"JFIF\0"), jfif=False),
    "a broken index of more pictures": jpeg_with(JPEG, segment(0xE2, b"MPF\0garbage")),
    "Photoshop's block is cut off": jpeg_with(JPEG, segment(0xED, b"Photoshop 3.0\0008BIM\3\xed")),
    "no end marker (Pillow #2038)": without_end(JPEG),
    "half an end marker": JPEG[:-1],
    "garbage after the end marker": JPEG + GARBAGE,
}


@pytest.mark.parametrize("data", SAME_AS_JPEG.values(), ids=SAME_AS_JPEG.keys())
def test_metadata_of_a_jpeg_change_nothing(data: bytes) -> None:
    assert pixels(data) == pixels(JPEG)


@pytest.mark.parametrize(
    "options",
    [
        pytest.param({"progressive": True}, id="progressive"),
        pytest.param({"restart_marker_rows": 1}, id="restart markers"),
        pytest.param({"subsampling": 2, "quality": 30}, id="subsampled"),
    ],
)
def test_any_jpeg_may_lack_its_end_marker(options: dict[str, int]) -> None:
    data = encode(picture(), "JPEG", **options)
    assert pixels(without_end(data)) == pixels(data)
    for missing in (5, 100, len(data) // 3):
        with pytest.raises(InvalidImage, match="cut off"):
            pixels(data[:-missing])


def test_a_progressive_jpeg_may_not_lack_a_scan() -> None:
    data = encode(picture(), "JPEG", progressive=True)
    last_scan = data.rindex(b"\xff\xda")
    with pytest.raises(InvalidImage, match="cut off"):
        pixels(data[:last_scan])


TEXT = 0x010E, 2, 1, b"x\0\0\0"
ODD_TAGS = {
    "a resolution that is text (Pillow #4665)": (0x011A, 2, 3, b"72\0\0"),
    "a value far away": (0x011A, 5, 1, b"\xff\xff\xff\x7f"),
    "an unknown type": (0x9999, 99, 1, bytes(4)),
    "far too many values": (0x9999, 4, 0xFFFFFFFF, bytes(4)),
    "no values": (0x011A, 5, 0, bytes(4)),
    "a directory that is text": (0x8769, 2, 3, b"no\0\0"),
}


@pytest.mark.parametrize("tag", ODD_TAGS.values(), ids=ODD_TAGS.keys())
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WebP"])
def test_odd_tags_do_not_hide_the_orientation(tag: tuple[int, int, int, bytes], kind: str) -> None:
    def of(*tags: tuple[int, int, int, bytes]) -> bytes:
        if kind == "JPEG":
            return jpeg_with(JPEG, segment(0xE1, EXIF + exif(*tags)))
        if kind == "PNG":
            return with_chunk(chunk(b"eXIf", exif(*tags)))
        return webp_with((b"EXIF", exif(*tags)))

    expected = pixels(encode(picture().transpose(Image.Transpose.ROTATE_270)))
    if kind == "JPEG":
        turned = jpeg_with(JPEG, segment(0xE1, EXIF + exif(orientation_tag(6))))
        expected = pixels(turned)
        assert expected != pixels(JPEG)
    assert pixels(of(orientation_tag(6), tag)) == expected
    assert pixels(of(tag, orientation_tag(6))) == expected


def test_the_orientation_may_be_said_elsewhere() -> None:
    expected = pixels(encode(picture().transpose(Image.Transpose.ROTATE_270)))
    tags = exif(orientation_tag(6, ">"), order=">")
    text = b"\nexif\n%8d\n%s\n" % (len(tags), tags.hex().encode())
    xmp = b'<rdf:Description tiff:Orientation="6"/>'
    assert pixels(with_chunk(chunk(b"eXIf", EXIF + tags))) == expected
    for name, body in (
        (b"tEXt", b"Raw profile type exif\0" + text),
        (b"zTXt", b"Raw profile type exif\0\0" + zlib.compress(text)),
        (b"iTXt", b"XML:com.adobe.xmp\0\0\0\0\0" + xmp),
        (b"iTXt", b"XML:com.adobe.xmp\0\1\0\0\0" + zlib.compress(xmp)),
    ):
        assert pixels(with_chunk(chunk(name, body))) == expected
    assert pixels(webp_with((b"XMP ", xmp), (b"EXIF", GARBAGE))) == expected


@pytest.mark.parametrize("value", [0, 9, 65535])
def test_an_impossible_orientation_is_none(value: int) -> None:
    assert pixels(with_chunk(chunk(b"eXIf", exif(orientation_tag(value))))) == pixels(PLAIN)


def test_an_odd_tag_of_a_turned_tiff_changes_nothing() -> None:
    grey = np.array(picture().convert("L"))
    upright = Image.fromarray(grey).transpose(Image.Transpose.ROTATE_270)
    data = tiff(grey, tags={274: [6], 282: [55, 50], 34665: [60000]}, kinds={274: 3, 282: 2})
    assert pixels(data) == pixels(encode(upright))


@pytest.mark.parametrize("name", [b"IHDR", b"PLTE", b"IDAT", b"IEND"])
def test_a_critical_chunk_with_a_wrong_checksum_is_an_error(name: bytes) -> None:
    data = bytearray(encode(picture().quantize(16)))
    data[data.index(name) + 4 + int.from_bytes(data[data.index(name) - 4 : data.index(name)])] ^= 1
    with pytest.raises(InvalidImage, match="damaged: its PNG data"):
        pixels(bytes(data))


def test_minus_1000_of_a_signed_tiff_is_black() -> None:  # Pillow #452
    black = encode(Image.new("L", (16, 16), 0))
    assert pixels(tiff(np.full((16, 16), -1000, np.int16))) == pixels(black)


def test_4095_of_a_12_bit_tiff_is_white() -> None:
    white = encode(Image.new("L", (16, 16), 255))
    assert pixels(tiff(np.full((16, 16), 4095, np.uint16), 12)) == pixels(white)


def test_a_transparent_value_of_16_bit_grey_is_white() -> None:  # oxipng #470
    grey = np.zeros((16, 16), np.uint16)
    grey[:, 8:] = 117 * 257
    twin = np.where(grey == 0, 255, 117).astype(np.uint8)
    data = png_of(grey, 0, 16, chunk(b"tRNS", struct.pack(">H", 0)))
    assert pixels(data) == pixels(encode(Image.fromarray(twin)))


NOISE = Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8))
HALVES = {
    "JPEG": encode(NOISE, "JPEG"),
    "PNG": encode(NOISE),
    "WebP": encode(NOISE, "WEBP"),
    "GIF": encode(NOISE, "GIF"),
    "TIFF": encode(NOISE, "TIFF"),
    "TIFF ": encode(NOISE, "TIFF", compression="tiff_lzw", strip_size=1000),
    "BMP": encode(NOISE, "BMP"),
    "AVIF": encode(NOISE, "AVIF"),
}


@pytest.mark.parametrize("name", HALVES)
def test_half_a_picture_is_said_to_be_cut_off(name: str) -> None:
    data = HALVES[name]
    with pytest.raises(InvalidImage) as caught:
        pixels(data[: len(data) // 2])
    assert caught.value.kind == "truncated"
    assert caught.value.message == (
        f"the image is cut off: its {name.strip()} data end before the last pixel; "
        "send the whole file"
    )


OTHERS = {
    "text": (b"I am a picture", "this is not an image"),
    "PDF": (b"%PDF-1.7", "PDF files are not supported"),
    "SVG": (b"<?xml version='1.0'?><svg/>", "SVG images are not supported"),
    "JPEG XL": (b"\xff\x0a" + bytes(9), "JPEG XL images are not supported"),
    "video": (b"\0\0\0\x14ftypisom\0\0\0\0mp42", "videos are not supported"),
    "12-bit JPEG": (
        JPEG.replace(b"\xff\xc0\0\x11\x08", b"\xff\xc0\0\x11\x0c"),
        "JPEG images of 12 bits per sample are not supported",
    ),
    "too large": (encode(Image.new("1", (9000, 9000))), "too large: 9000 x 9000 pixels"),
}


@pytest.mark.parametrize(("data", "message"), OTHERS.values(), ids=OTHERS.keys())
def test_an_error_says_what_the_file_is_and_what_to_do(data: bytes, message: str) -> None:
    with pytest.raises(InvalidImage) as caught:
        pixels(data)
    assert message in caught.value.message
    assert "send JPEG, PNG, WebP" in caught.value.message or "maximum" in caught.value.message


def test_decoders_write_nothing_to_stderr(capfd: pytest.CaptureFixture[str]) -> None:
    data = bytearray(encode(NOISE, "TIFF", compression="tiff_adobe_deflate"))
    data[20:40] = bytes(20)
    with pytest.raises(InvalidImage, match="damaged"):
        pixels(bytes(data))
    assert capfd.readouterr().err == ""
