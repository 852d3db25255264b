"""Samples of every depth, sign and colour model become the pixels of an 8-bit twin."""

from __future__ import annotations

import io
import struct
import zlib
from typing import Any

import numpy as np
import pillow_heif
import pytest
from numpy.typing import NDArray
from PIL import Image

from blip2_serve.errors import InvalidImage
from blip2_serve.model.processor import ImageProcessor
from blip2_serve.model.source import DEMO_FOLDER
from support.images import encode
from support.pictures import chunk, chunks, png, png_of, scanlines, tiff

WIDTH, HEIGHT = 24, 16

RNG = np.random.default_rng(16)
GREY = RNG.integers(0, 256, (HEIGHT, WIDTH), dtype=np.uint8)
RGB = RNG.integers(0, 256, (HEIGHT, WIDTH, 3), dtype=np.uint8)
ALPHA = RNG.integers(0, 256, (HEIGHT, WIDTH, 1), dtype=np.uint8)
RGBA, LA = np.concatenate((RGB, ALPHA), 2), np.concatenate((GREY[..., None], ALPHA), 2)
CMYK = RNG.integers(0, 256, (HEIGHT, WIDTH, 4), dtype=np.uint8)


def pixels(data: bytes) -> NDArray[np.uint8]:
    """Of the picture's own size, so that each of them counts."""
    loaded = ImageProcessor.load(DEMO_FOLDER)
    size = (HEIGHT, WIDTH)
    own = ImageProcessor(size, loaded.mean, loaded.std, loaded.rescale, loaded.resample)
    return own.pixels(data)


def twin(values: NDArray[Any]) -> NDArray[np.uint8]:
    """As the same values of 8 bits in a PNG."""
    return pixels(encode(Image.fromarray(values.astype(np.uint8))))


def equal(data: bytes, values: NDArray[Any]) -> bool:
    return np.array_equal(pixels(data), twin(values))


def wide(values: NDArray[np.uint8], bits: int) -> NDArray[np.uint64]:
    """Values of 8 bits at another full scale."""
    return (values.astype(object) * (2**bits - 1) // 255).astype(np.uint64)


def rounded(values: NDArray[np.uint64], bits: int) -> NDArray[np.uint8]:
    full = 2**bits - 1
    return ((values.astype(object) * 510 + full) // (2 * full)).astype(np.uint8)


@pytest.mark.parametrize("order", "<>")
@pytest.mark.parametrize("photometric", [0, 1], ids=["white is zero", "black is zero"])
@pytest.mark.parametrize("bits", [1, 2, 4, 6, 8, 10, 12, 14, 16, 24, 32, 64])
def test_the_full_scale_of_an_unsigned_tiff_is_white(
    bits: int, photometric: int, order: str
) -> None:
    values = wide(GREY, bits)
    expected = rounded(values, bits)
    data = tiff(values, bits, photometric=photometric, order=order)
    assert equal(data, expected if photometric else 255 - expected)


@pytest.mark.parametrize("order", "<>")
@pytest.mark.parametrize("photometric", [0, 1], ids=["white is zero", "black is zero"])
@pytest.mark.parametrize("kind", ["i1", "i2", "i4", "i8"])
def test_below_zero_is_black_in_a_signed_tiff(kind: str, photometric: int, order: str) -> None:
    size = np.dtype(kind).itemsize
    values = wide(GREY, 8 * size - 1)
    expected = rounded(values, 8 * size - 1)
    signed = values.astype(kind)
    signed[::2] *= -1
    expected[::2] = 0
    data = tiff(signed, photometric=photometric, order=order)
    assert equal(data, expected if photometric else 255 - expected)


@pytest.mark.parametrize("order", "<>")
@pytest.mark.parametrize("kind", ["f2", "f4", "f8"])
def test_floats_go_from_0_to_1(kind: str, order: str) -> None:
    values = (GREY / 255).astype(kind)
    expected = GREY.copy()
    values[0, :5], expected[0, :5] = (np.nan, -np.inf, np.inf, -3, 1e4), (0, 0, 255, 0, 255)
    assert equal(tiff(values, order=order), expected)
    inverted = 255 - expected
    inverted[0, 0] = 0  # no number is black in any case
    assert equal(tiff(values, order=order, photometric=0), inverted)


@pytest.mark.parametrize("kind", ["u4", "i4", "f4", "f8"])
def test_a_tiff_may_say_what_black_and_white_are(kind: str) -> None:
    values = (GREY.astype(np.int64) * 100 + 7000).astype(kind)
    tags = {340: [7000], 341: [7000 + 25500]}
    for tiff_type in (4, 12):
        assert equal(tiff(values, tags=tags, kinds={340: tiff_type, 341: tiff_type}), GREY)
    assert equal(tiff(values, tags=tags, photometric=0), 255 - GREY)


@pytest.mark.parametrize(
    "limits", [(5, 5), (9, 1), (0, np.nan), (-np.inf, 1)], ids=["equal", "swapped", "NaN", "inf"]
)
def test_impossible_limits_are_none(limits: tuple[float, float]) -> None:
    least, most = limits
    values = (GREY / 255).astype(np.float32)
    tags = {340: [float(least)], 341: [float(most)]}
    assert equal(tiff(values, tags=tags), GREY)


def test_limits_of_16_bits_are_statistics_and_no_scale() -> None:
    values = wide(GREY, 16).astype(np.uint16)
    assert equal(tiff(values, tags={340: [100], 341: [200]}), GREY)


@pytest.mark.parametrize("options", [{}, {"planar": True}, {"tile": 16}, {"rows_per_strip": 5}])
@pytest.mark.parametrize("big", [False, True], ids=["TIFF", "BigTIFF"])
@pytest.mark.parametrize("order", "<>")
def test_16_bit_colours_of_a_tiff(order: str, big: bool, options: dict[str, Any]) -> None:
    for values in (RGB, RGBA, LA):
        data = tiff(
            values.astype(np.uint16) * 257,
            photometric=1 if values is LA else 2,
            order=order,
            big=big,
            tags={} if values is RGB else {338: [2]},
            **options,
        )
        assert equal(data, values)


@pytest.mark.parametrize("tile", [0, 16])
@pytest.mark.parametrize("planar", [False, True])
@pytest.mark.parametrize("order", "<>")
@pytest.mark.parametrize(
    ("kind", "predictor"), [("u2", 2), ("u4", 2), ("i2", 2), ("f4", 2), ("f4", 3), ("f8", 3)]
)
def test_predictors_are_undone(
    kind: str, predictor: int, order: str, planar: bool, tile: int
) -> None:
    scale = {"u2": 257, "u4": 16843009, "i2": 128, "f4": 1 / 255, "f8": 1 / 255}[kind]
    values = (RGB * np.float64(scale)).astype(kind)
    expected = rounded(values.astype(np.uint64), 15) if kind == "i2" else RGB
    data = tiff(
        values,
        photometric=2,
        order=order,
        predictor=predictor,
        deflate=True,
        planar=planar,
        tile=tile,
    )
    assert equal(data, expected)


def test_alpha_of_a_tiff_may_be_multiplied_already() -> None:
    alpha = np.full_like(ALPHA, 128)
    values = np.concatenate((RGB // 2, alpha), 2)
    data = tiff(values.astype(np.uint16) * 257, photometric=2, tags={338: [1]})
    assert np.array_equal(pixels(data), twin(RGB // 2 + 127))


def test_other_channels_of_a_tiff_are_passed_over() -> None:
    values = np.concatenate((RGB, ALPHA, ALPHA), 2).astype(np.uint16) * 257
    assert equal(tiff(values, photometric=2, tags={338: [0, 0]}), RGB)


@pytest.mark.parametrize("bits", [8, 16])
def test_cmyk_of_a_tiff_is_ink(bits: int) -> None:
    values = CMYK if bits == 8 else CMYK.astype(np.uint16) * 257
    image = Image.frombytes("CMYK", (WIDTH, HEIGHT), CMYK.tobytes())
    assert equal(tiff(values, photometric=5), np.asarray(image.convert("RGB")))


@pytest.mark.parametrize(("ink", "grey"), [(0, 255), (255, 0)])
def test_cmyk_of_a_jpeg_is_inverted_as_adobe_writes_it(ink: int, grey: int) -> None:
    image = Image.new("CMYK", (WIDTH, HEIGHT), (0, 0, 0, ink))
    data = encode(image, "JPEG", quality=100)
    assert b"Adobe" in data
    assert equal(data, np.full((HEIGHT, WIDTH), grey))


def test_lab_of_a_tiff_is_seen_in_srgb() -> None:
    image = Image.new("LAB", (WIDTH, HEIGHT), (128, 128, 128))
    seen = pixels(encode(image, "TIFF"))
    assert seen.min() == seen.max()
    assert 115 <= seen.max() <= 125  # half the lightness is a grey of 119


@pytest.mark.parametrize("values", [GREY, RGB, LA, RGBA], ids=["grey", "RGB", "grey + A", "RGBA"])
def test_16_bits_of_a_png_are_rounded(values: NDArray[np.uint8]) -> None:
    colours = {2: 0, 3: 2}.get(values.ndim, 0) if values.ndim == 2 else {2: 4, 3: 2, 4: 6}
    kind = colours if isinstance(colours, int) else colours[values.shape[2]]
    sixteen = values.astype(np.int64) * 257
    nearby = sixteen + RNG.integers(-128, 129, sixteen.shape)
    assert equal(png_of(nearby.clip(0, 65535), kind, 16), values)


@pytest.mark.parametrize("bits", [1, 2, 4, 8, 16])
def test_one_value_of_grey_is_transparent(bits: int) -> None:
    values = wide(GREY, bits)
    chosen = int(values[3, 3])
    data = png_of(values, 0, bits, chunk(b"tRNS", struct.pack(">H", chosen)))
    assert equal(data, np.where(values == chosen, 255, rounded(values, bits)))


@pytest.mark.parametrize("bits", [8, 16])
def test_one_colour_is_transparent(bits: int) -> None:
    values = wide(RGB, bits)
    if bits == 16:
        values[5, 5] = values[3, 3] ^ np.uint64(1)  # another colour, if the lower bytes count
    data = png_of(values, 2, bits, chunk(b"tRNS", struct.pack(">3H", *map(int, values[3, 3]))))
    expected = rounded(values, bits)
    expected[3, 3] = 255
    assert equal(data, expected)


def test_modes_of_8_bits_and_less() -> None:
    rgb, grey, la = Image.fromarray(RGB), Image.fromarray(GREY), Image.fromarray(LA)
    on_white = np.rint(255 - ALPHA[..., 0] / 255 * (255.0 - GREY))
    bilevel = grey.convert("1")
    assert equal(encode(bilevel), np.asarray(bilevel.convert("L")))
    assert equal(encode(bilevel, "TIFF", compression="group4"), np.asarray(bilevel.convert("L")))
    for data in (encode(la), encode(la, "WEBP", lossless=True, exact=True), encode(la, "TIFF")):
        assert np.abs(pixels(data)[0] - on_white).max() <= 1
    with_alpha = rgb.quantize(16)
    colours = np.asarray(with_alpha.convert("RGB"))
    with_alpha = with_alpha.convert("PA")
    with_alpha.putalpha(Image.fromarray(ALPHA[..., 0]))
    expected = np.rint(255 - ALPHA / 255 * (255.0 - colours))
    assert np.abs(pixels(encode(with_alpha, "TIFF")).transpose(1, 2, 0) - expected).max() <= 1
    first = encode(rgb, "MPO", save_all=True, append_images=[rgb.rotate(90)], quality=95)
    assert np.array_equal(pixels(first), pixels(encode(rgb, "JPEG", quality=95)))


def bmp(values: NDArray[np.uint8]) -> bytes:
    """Of RGBA, by bit fields."""
    size = struct.pack("<LllHHLLllLL", 108, WIDTH, -HEIGHT, 1, 32, 3, values.size, 0, 0, 0, 0)
    masks = struct.pack("<4L", 0xFF, 0xFF00, 0xFF0000, 0xFF000000)
    header = b"BM" + struct.pack("<LLL", 122 + values.size, 0, 122) + size + masks
    return header.ljust(122, b"\0") + values.tobytes()


def test_a_bmp_whose_alpha_is_nowhere_set_has_none() -> None:
    assert equal(bmp(RGBA), RGBA)
    assert equal(bmp(RGBA * np.array([1, 1, 1, 0], np.uint8)), RGB)


# -- animations ------------------------------------------------------------------------------------


def test_the_first_frame_of_an_animation_is_taken() -> None:
    first, second = Image.fromarray(RGB), Image.fromarray(255 - RGB)
    frames = {"save_all": True, "append_images": [second], "duration": 100}
    assert equal(encode(first, "PNG", **frames), RGB)
    assert equal(encode(first, "WEBP", lossless=True, **frames), RGB)
    palette = first.quantize(64)
    assert equal(encode(palette, "GIF", **frames), np.asarray(palette.convert("RGB")))


def test_an_animated_webp_may_be_cut_off_after_its_first_frame() -> None:
    frames = {"save_all": True, "append_images": [Image.fromarray(255 - RGB)]}
    data = encode(Image.fromarray(RGB), "WEBP", lossless=True, **frames)
    assert equal(data[:-20], RGB)


def gif(*, transparent: bool) -> bytes:
    """A frame of 8 x 8 at (4, 4) on a larger canvas; its first colour is red."""
    frame = Image.new("P", (8, 8), 1)
    frame.putpalette([255, 0, 0, 0, 0, 255])
    data = bytearray(encode(frame, "GIF", **({"transparency": 0} if transparent else {})))
    data[6:10] = struct.pack("<HH", WIDTH, HEIGHT)
    data[data.index(b",", 13) + 1 :][:4] = b""
    place = data.index(b"," + bytes(4))
    data[place + 1 : place + 5] = struct.pack("<HH", 4, 4)
    return bytes(data)


@pytest.mark.parametrize("transparent", [False, True])
def test_what_a_gifs_first_frame_leaves_free_is_white(transparent: bool) -> None:
    expected = np.full((HEIGHT, WIDTH, 3), 255)
    expected[4:12, 4:12] = 0, 0, 255
    assert equal(gif(transparent=transparent), expected)


def apng(*, default_is_shown: bool, blend: int = 0, corner: tuple[int, int] = (4, 6)) -> bytes:
    """Red by default; the animation's only other frame is blue, 8 x 8, and half of it clear."""
    red = np.zeros((HEIGHT, WIDTH, 4), np.uint8)
    red[...] = 255, 0, 0, 255
    blue = np.zeros((8, 8, 4), np.uint8)
    blue[:4] = 0, 0, 255, 255
    whole = struct.pack(">5L", 0, WIDTH, HEIGHT, 0, 0) + struct.pack(">2H2B", 1, 1, 0, blend)
    number = int(default_is_shown)
    part = struct.pack(">5L", number, 8, 8, *corner) + struct.pack(">2H2B", 1, 1, 0, blend)
    header, *_ = (body for name, body in chunks(encode(Image.fromarray(red))) if name == b"IHDR")
    return png(
        chunk(b"IHDR", header),
        chunk(b"acTL", struct.pack(">2L", 1 + number, 0)),
        *([chunk(b"fcTL", whole)] if default_is_shown else []),
        chunk(b"IDAT", scanlines(red, 8)),
        chunk(b"fcTL", part),
        chunk(b"fdAT", struct.pack(">L", number + 1) + scanlines(blue, 8)),
        chunk(b"IEND"),
    )


def test_an_apng_shows_its_default_image_if_the_animation_does() -> None:
    expected = np.zeros((HEIGHT, WIDTH, 3))
    expected[...] = 255, 0, 0
    assert equal(apng(default_is_shown=True), expected)
    # An animation that is broken: the default image is for those who cannot play it.
    assert equal(apng(default_is_shown=False, corner=(WIDTH, 0)), expected)
    assert equal(apng(default_is_shown=False).replace(b"acTL", b"acTX"), expected)


@pytest.mark.parametrize("blend", [0, 1])
def test_an_apng_whose_default_image_is_not_in_the_animation_shows_its_frame(blend: int) -> None:
    expected = np.full((HEIGHT, WIDTH, 3), 255)
    expected[6:10, 4:12] = 0, 0, 255
    assert equal(apng(default_is_shown=False, blend=blend), expected)


# -- what phones send ------------------------------------------------------------------------------

SMOOTH = Image.fromarray(RGB).resize((3, 2)).resize((WIDTH, HEIGHT), Image.Resampling.BICUBIC)


@pytest.mark.parametrize("kind", ["AVIF", "HEIF"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_avif_and_heic_are_read_upright(kind: str, orientation: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    seen = pixels(encode(SMOOTH, kind, quality=100, exif=exif.tobytes())).astype(int)
    turned = pixels(encode(SMOOTH, exif=exif)).astype(int)
    assert np.abs(seen - turned).mean() < 4


@pytest.mark.parametrize("kind", ["AVIF", "HEIF"])
@pytest.mark.parametrize("mode", ["L", "RGBA"])
def test_avif_and_heic_of_other_modes(kind: str, mode: str) -> None:
    image = SMOOTH.convert(mode)
    if mode == "RGBA":
        image.paste((0, 0, 0, 0), (0, 0, WIDTH // 2, HEIGHT))
    seen = pixels(encode(image, kind, quality=100)).astype(int)
    assert np.abs(seen - pixels(encode(image)).astype(int)).mean() < 4


@pytest.mark.parametrize("kind", ["AVIF", "HEIF"])
def test_junk_exif_of_avif_and_heic_changes_nothing(kind: str) -> None:
    exif = Image.Exif()
    exif[0x0112], exif[0x010E] = 6, "described"
    data = encode(SMOOTH, kind, exif=exif.tobytes())
    place = data.rindex(b"MM\0*")
    junk = data[:place] + b"J" * 20 + data[place + 20 :]
    assert np.array_equal(pixels(junk), pixels(data))


def test_the_first_frame_of_an_avif_sequence_is_taken() -> None:
    frames = {"save_all": True, "append_images": [Image.new("RGB", (WIDTH, HEIGHT))]}
    seen = pixels(encode(SMOOTH, "AVIF", quality=100, **frames)).astype(int)
    assert np.abs(seen - pixels(encode(SMOOTH)).astype(int)).mean() < 4


def test_ten_bits_of_heic_become_eight() -> None:
    ten = np.asarray(SMOOTH).astype(np.uint16) * 257
    file = pillow_heif.from_bytes(mode="RGB;16", size=(WIDTH, HEIGHT), data=ten.tobytes())
    buffer = io.BytesIO()
    file.save(buffer, quality=100)
    seen = pixels(buffer.getvalue()).astype(int)
    assert np.abs(seen - pixels(encode(SMOOTH)).astype(int)).mean() < 4


# -- bounds ----------------------------------------------------------------------------------------


def test_samples_of_many_bytes_are_bounded() -> None:
    one = tiff(np.zeros((1, 1, 4)), photometric=2, deflate=True, tags={338: [2]})
    head = one.index(struct.pack("<HHLL", 256, 4, 1, 1))
    large = bytearray(one)
    large[head + 8 : head + 12] = large[head + 20 : head + 24] = struct.pack("<L", 8000)
    with pytest.raises(InvalidImage, match="too large"):
        pixels(bytes(large))


MANY = 100_001
JPEG_START = encode(Image.fromarray(RGB), "JPEG")
COUNTLESS = {
    "TIFF": tiff(np.zeros((MANY, 1), np.uint8), rows_per_strip=1),
    "JPEG": JPEG_START[:2] + MANY * b"\xff\xfe\0\2" + JPEG_START[2:],
    "PNG": png_of(GREY, 0, 8, MANY * chunk(b"teXt")),
    "WebP": b"RIFF    WEBP" + MANY * (b"quux" + bytes(4)),
    "HEIC": b"\0\0\0\x0cftypheic" + MANY * b"\0\0\0\x08free",
}


@pytest.mark.parametrize("name", COUNTLESS)
def test_a_file_of_countless_parts_is_refused(name: str) -> None:
    with pytest.raises(InvalidImage, match="more than 100,000 parts"):
        pixels(COUNTLESS[name])


def enlarged(name: str) -> bytes:
    """A file of a few pixels that claims 16,000 x 15,000."""
    image = Image.fromarray(RGB)
    if name == "TIFF":
        data = bytearray(tiff(GREY))
        for tag, size in ((256, 16_000), (257, 15_000)):
            place = data.index(struct.pack("<HHL", tag, 4, 1)) + 8
            data[place : place + 4] = struct.pack("<L", size)
        return bytes(data)
    data = bytearray(encode(image, "WEBP" if name == "animated WebP" else name))
    if name == "animated WebP":
        canvas = (15_999).to_bytes(3, "little") + (14_999).to_bytes(3, "little")
        return bytes(data[:12]) + b"VP8X\x0a\0\0\0\0\0\0\0" + canvas + bytes(data[12:])
    place, form = {
        "JPEG": (data.find(b"\xff\xc0") + 5, ">2H"),
        "PNG": (16, ">2L"),
        "WEBP": (26, "<2H"),
        "GIF": (6, "<2H"),
        "BMP": (18, "<2L"),
        "AVIF": (data.find(b"ispe") + 8, ">2L"),
        "HEIF": (data.find(b"ispe") + 8, ">2L"),
    }[name]
    sizes = (15_000, 16_000) if name == "JPEG" else (16_000, 15_000)
    data[place : place + struct.calcsize(form)] = struct.pack(form, *sizes)
    if name == "PNG":
        data[29:33] = struct.pack(">L", zlib.crc32(data[12:29]))
    return bytes(data)


@pytest.mark.parametrize(
    "name", ["JPEG", "PNG", "WEBP", "animated WebP", "AVIF", "HEIF", "GIF", "BMP", "TIFF"]
)
def test_too_many_pixels_are_refused_before_they_are_decoded(name: str) -> None:
    with pytest.raises(InvalidImage, match="too large: 16000 x 15000 pixels") as caught:
        pixels(enlarged(name))
    assert caught.value.kind == "pixels"
