"""The pictures that load tests send: drawn scenes with known captions, and large photographs."""

from __future__ import annotations

import base64
import io
import random
from functools import cache

from PIL import Image

from blip2_serve.demo import scenes
from blip2_serve.demo.scenes import Scene

# Held-out scenes that the shipped checkpoint describes correctly.
FIRST_SCENE, SCENES = 7_150, 64
PHOTOGRAPHS, PHOTOGRAPH_SIZE = 4, (3000, 2000)


@cache
def scene(number: int) -> Scene:
    return scenes.sample(FIRST_SCENE + number % SCENES)


@cache
def png(number: int) -> bytes:
    """The picture of `scene(number)`."""
    return _encode(scene(number % SCENES).image, "PNG")


def unseen(picture: bytes, rng: random.Random) -> bytes:
    """The same picture as a file that no cache knows: decoders ignore bytes after the end."""
    return picture + rng.randbytes(16)


@cache
def photograph(number: int) -> bytes:
    """A grainy JPEG of 3000 x 2000 pixels, some megabytes."""
    picture = scene(number % PHOTOGRAPHS).image.resize(PHOTOGRAPH_SIZE, Image.Resampling.BICUBIC)
    grain = Image.effect_noise(PHOTOGRAPH_SIZE, 40).convert("RGB")
    return _encode(Image.blend(picture, grain, 0.3), "JPEG")


def draw_all(*, photographs: bool) -> None:
    """Draws before the run: a photograph takes half a second, which would delay all requests."""
    for number in range(SCENES):
        png(number)
    for number in range(PHOTOGRAPHS if photographs else 0):
        photograph(number)


def data_url(data: bytes) -> str:
    kind = "jpeg" if data.startswith(b"\xff\xd8") else "png"
    return f"data:image/{kind};base64,{base64.b64encode(data).decode()}"


def _encode(image: Image.Image, kind: str) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, quality=90)
    return file.getvalue()
