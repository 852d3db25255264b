"""What is sent: drawn scenes, of which everything is known, and large photographs."""

from __future__ import annotations

import base64
import io
import random
from functools import cache

from PIL import Image

from blip2_serve.demo import scenes
from blip2_serve.demo.scenes import Scene

# Scenes that the shipped checkpoint was not trained on, and says the right thing about.
FIRST_SCENE, SCENES = 7_150, 64
PHOTOGRAPHS, PHOTOGRAPH_SIZE = 4, (3000, 2000)


@cache
def scene(number: int) -> Scene:
    """One of SCENES."""
    return scenes.sample(FIRST_SCENE + number % SCENES)


@cache
def png(number: int) -> bytes:
    """The picture of `scene(number)`."""
    return _encoded(scene(number % SCENES).image, "PNG")


def unseen(picture: bytes, rng: random.Random) -> bytes:
    """The same picture in other bytes, which no cache has: decoders stop at a picture's end."""
    return picture + rng.randbytes(16)


@cache
def photograph(number: int) -> bytes:
    """A JPEG as large as a photograph: 3000 x 2000, some megabytes."""
    picture = scene(number % PHOTOGRAPHS).image.resize(PHOTOGRAPH_SIZE, Image.Resampling.BICUBIC)
    grain = Image.effect_noise(PHOTOGRAPH_SIZE, 40).convert("RGB")
    return _encoded(Image.blend(picture, grain, 0.3), "JPEG")


def draw_all(*, photographs: bool) -> None:
    """Beforehand: drawing a photograph would hold up all other requests for half a second."""
    for number in range(SCENES):
        png(number)
    for number in range(PHOTOGRAPHS if photographs else 0):
        photograph(number)


def data_url(data: bytes) -> str:
    kind = "jpeg" if data.startswith(b"\xff\xd8") else "png"
    return f"data:image/{kind};base64,{base64.b64encode(data).decode()}"


def _encoded(image: Image.Image, kind: str) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, quality=90)
    return file.getvalue()
