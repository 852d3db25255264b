"""What was reported against other servers of models, and against the libraries that they use.

Tests by other reports are where their subject is: `grep -r CVE- tests`.
"""

from __future__ import annotations

import asyncio
import io
import re
from pathlib import Path
from unittest import mock

import pytest
from PIL import Image

from blip2_serve.config import AppConfig
from blip2_serve.errors import InvalidImage
from blip2_serve.http import keys
from blip2_serve.model import pictures
from support.fake_backend import ROUTES, FakeBackend, body_for, client_of
from support.images import data_url, encode
from support.mutations import mutated, seeds

SIZE = (32, 32)
# What Pillow writes, and nothing here reads.
OTHER_FORMATS = ("BLP", "DDS", "EPS", "ICNS", "ICO", "IM", "JPEG2000", "PCX", "PDF", "PPM")
OTHER_FORMATS += ("SGI", "SPIDER", "TGA", "XBM")
# Ids of objects, names of classes and modules, paths: marks of a library's own messages.
FOREIGN = re.compile(r"0x[0-9a-f]{4}|object at|Error|Exception|PIL|libheif|zlib|/|_io", re.I)


def picture_of(format: str) -> bytes:
    mode = {"BLP": "P", "SPIDER": "F", "XBM": "1"}.get(format, "RGB")
    return encode(Image.new(mode, (32, 32)), format)


@pytest.mark.parametrize("format", OTHER_FORMATS)
def test_a_picture_of_another_format_reaches_no_decoder(format: str) -> None:
    """Pillow CVE-2026-25990 (PSD), -40192 (FITS), -42311: decoders that nobody needs.

    Pillow itself would open the file.
    """
    data = picture_of(format)
    if format not in ("PDF", "EPS"):  # which Pillow only writes, or reads by another program
        assert Image.open(io.BytesIO(data)).format
    with (
        mock.patch.object(Image, "open", side_effect=AssertionError("Pillow was asked")),
        pytest.raises(InvalidImage, match="JPEG, PNG, WebP"),
    ):
        pictures.decode(data, SIZE)


@pytest.mark.parametrize(
    "head", [b"8BPS\0\1", b"SIMPLE  =                    T"], ids=["PSD", "FITS"]
)
def test_the_head_of_another_format_is_enough(head: bytes) -> None:
    with pytest.raises(InvalidImage, match="JPEG, PNG, WebP"):
        pictures.decode(head + bytes(3000), SIZE)


@pytest.mark.parametrize("format", ["PSD", *seeds()])
def test_an_error_has_none_of_a_librarys_words(format: str) -> None:
    """vLLM CVE-2026-22778: Pillow's message told the address of an object on the heap."""
    broken = [b"8BPS"] if format == "PSD" else [mutated(format, seed) for seed in range(400)]
    messages = set()
    for data in broken:
        try:
            pictures.decode(data, SIZE)
        except InvalidImage as error:
            messages.add(str(error))
    assert messages
    assert not [message for message in messages if FOREIGN.search(message)]


def test_pillows_own_words_would_be_noticed() -> None:
    with pytest.raises(OSError, match=FOREIGN):
        Image.open(io.BytesIO(b"no picture"))


@pytest.mark.parametrize("route", ROUTES)
async def test_answers_times_tokens_are_limited(route: str) -> None:
    """vLLM CVE-2026-34756: n has no limit, and each answer takes memory."""
    config = AppConfig.model_validate({"ingress": {"admission": {"max_total_tokens": 100}}})
    backend = FakeBackend()
    async with client_of(backend, config) as client:
        for more in ({"n": 6, "temperature": 1}, {"num_beams": 6}):
            body = body_for(route, max_tokens=20, **more)
            answer = await client.post(route, json=body)
            assert answer.status_code == 400, answer.text
            assert not backend.encoded
    async with client_of(backend) as client:  # the usual limit is higher
        assert (await client.post(route, json=body)).status_code == 200


@pytest.mark.parametrize("field", ["uuid", "cache_salt", "multi_modal_uuids", "mm_hash"])
async def test_no_name_that_a_client_gives_stands_for_a_picture(field: str) -> None:
    """vLLM CVE-2026-105754: features were found by an id that the client had chosen."""
    backend = FakeBackend()
    async with client_of(backend) as client:
        for picture in (b"one", b"two"):
            part = {"type": "image_url", "image_url": {"url": data_url(picture)}}
            body = {"messages": [{"role": "user", "content": [part]}]}
            for place in (body, part):
                place[field] = "same"
                answer = await client.post("/v1/chat/completions", json=body)
                del place[field]
                if answer.status_code == 200:
                    assert backend.encoded[-1] == picture
                else:
                    assert field in answer.json()["error"]["message"]


def test_keys_are_compared_in_constant_time_only(tmp_path: Path) -> None:
    """vLLM CVE-2025-59425: `==` on keys tells by its time how many characters were right."""
    file = tmp_path / "keys.yaml"
    secret = keys.add_key(file, "somebody")
    known = keys.KeyFile(file)
    assert known.find(secret)
    with mock.patch.object(keys.hmac, "compare_digest", return_value=False) as compared:
        assert known.find(secret) is None  # so nothing else compares them
    ((kept, asked), _) = compared.call_args
    assert len(kept) == len(asked)


async def test_a_header_with_very_many_ranges_costs_nothing() -> None:
    """Starlette CVE-2025-62727: merging ranges took the square of their number."""
    many = "bytes=" + ",".join(f"{2 * number}-{2 * number}" for number in range(50_000))
    async with client_of(FakeBackend()) as client:
        page = (await client.get("/docs")).text
        (script,) = re.findall(r'src="([^"]+\.js)"', page)
        async with asyncio.timeout(10):
            answer = await client.get(script, headers={"Range": many})
    assert answer.status_code < 500
