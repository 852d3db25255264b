"""Generates scenes with captions, questions and chats, all that the shipped checkpoint knows.

A scene has one to three shapes on a coloured background, at most one per quarter. Everything about
it is a function of its seed. Training uses seeds from `FIRST_TRAINING_SEED` up, so smaller seeds
are held out.
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from functools import cached_property

from PIL import Image, ImageDraw

IMAGE_SIZE = 224
FIRST_TRAINING_SEED = 1_000_000

POSITIONS = ("top left", "top right", "bottom left", "bottom right")
SHAPES = ("circle", "square", "triangle", "cross")
SIZES = ("small", "large")
COLORS = {
    "red": (220, 40, 40),
    "green": (40, 165, 60),
    "blue": (45, 80, 220),
    "yellow": (245, 220, 50),
    "purple": (145, 50, 175),
    "orange": (250, 140, 25),
}
BACKGROUNDS = {"white": (240, 240, 240), "black": (20, 20, 20), "gray": (128, 128, 128)}
NUMBERS = ("zero", "one", "two", "three")

Turn = tuple[str, str]

_RADIUS = {"small": (22, 26), "large": (42, 47)}
_COLOR_JITTER = 10


@dataclass(frozen=True)
class Thing:
    """One shape in a scene. `center` (x, y) and `radius` are in pixels of the image."""

    shape: str
    size: str
    color: str
    position: str
    center: tuple[int, int]
    radius: int
    rgb: tuple[int, int, int]

    def __str__(self) -> str:
        return f"a {self.size} {self.color} {self.shape}"


@dataclass(frozen=True)
class Scene:
    """A scene, its image, and the texts about it."""

    seed: int
    things: tuple[Thing, ...]  # in reading order: top left, top right, bottom left, bottom right
    background: str
    background_rgb: tuple[int, int, int]

    @cached_property
    def image(self) -> Image.Image:
        """The scene as an RGB image of 224 x 224 pixels."""
        image = Image.new("RGB", (IMAGE_SIZE, IMAGE_SIZE), self.background_rgb)
        draw = ImageDraw.Draw(image)
        for thing in self.things:
            _draw(draw, thing)
        return image

    @cached_property
    def caption(self) -> str:
        """For example: "a small red circle at the top left on a white background"."""
        parts = [f"{thing} at the {thing.position}" for thing in self.things]
        listing = parts[0] if len(parts) == 1 else f"{', '.join(parts[:-1])} and {parts[-1]}"
        return f"{listing} on a {self.background} background"

    @cached_property
    def questions(self) -> list[Turn]:
        """(question, answer) pairs: one of each kind that has a unique answer in this scene."""
        rng = random.Random(f"questions {self.seed}")
        taken = {thing.position: thing for thing in self.things}
        free = [p for p in POSITIONS if p not in taken]
        position = rng.choice(list(taken))
        pairs = [
            ("how many shapes are there?", NUMBERS[len(self.things)]),
            ("what color is the background?", self.background),
            (f"what is at the {position}?", str(taken[position])),
            (f"what is at the {rng.choice(free)}?", "nothing"),
            self._existence(rng),
        ]
        for thing in self.things:
            if self._count("shape", thing.shape) == 1:
                pairs.append((f"what color is the {thing.shape}?", thing.color))
                pairs.append((f"where is the {thing.shape}?", thing.position))
                pairs.append((f"is the {thing.shape} small or large?", thing.size))
            if self._count("color", thing.color) == 1:
                pairs.append((f"what shape is {thing.color}?", thing.shape))
        return pairs

    @cached_property
    def chat(self) -> list[Turn]:
        """Two to four turns; the second refers back to the first ("what color is it?")."""
        rng = random.Random(f"chat {self.seed}")
        thing = rng.choice(self.things)
        follow_ups = [
            ("what color is it?", thing.color),
            ("what shape is it?", thing.shape),
            ("is it small or large?", thing.size),
        ]
        others = rng.sample(self.questions, rng.choice((0, 1, 2)))
        return [(f"what is at the {thing.position}?", str(thing)), rng.choice(follow_ups), *others]

    def _count(self, attribute: str, value: str) -> int:
        return sum(getattr(thing, attribute) == value for thing in self.things)

    def _existence(self, rng: random.Random) -> Turn:
        present = {(thing.color, thing.shape) for thing in self.things}
        if rng.random() < 0.5:
            return _existence_question(*rng.choice(sorted(present))), "yes"
        # Half of the "no" pairs differ from something present in one word only.
        color, shape = rng.choice(sorted(present))
        while (color, shape) in present:
            if rng.random() < 0.5:
                color = rng.choice(list(COLORS))
            else:
                shape = rng.choice(SHAPES)
        return _existence_question(color, shape), "no"


def _existence_question(color: str, shape: str) -> str:
    return f"is there {'an' if color == 'orange' else 'a'} {color} {shape}?"


def sample(seed: int) -> Scene:
    """Returns the scene of this seed; equal seeds give equal scenes."""
    rng = random.Random(f"scene {seed}")
    positions = sorted(rng.sample(POSITIONS, rng.choice((1, 2, 3))), key=POSITIONS.index)
    background = rng.choice(list(BACKGROUNDS))
    things = tuple(_sample_thing(rng, position) for position in positions)
    return Scene(seed, things, background, _jitter(rng, BACKGROUNDS[background]))


def _sample_thing(rng: random.Random, position: str) -> Thing:
    size = rng.choice(SIZES)
    color = rng.choice(list(COLORS))
    radius = rng.randint(*_RADIUS[size])
    half = IMAGE_SIZE // 2
    slack = half // 2 - radius - 4
    row, column = divmod(POSITIONS.index(position), 2)
    center = tuple(half // 2 + half * index + rng.randint(-slack, slack) for index in (column, row))
    rgb = _jitter(rng, COLORS[color])
    return Thing(rng.choice(SHAPES), size, color, position, (center[0], center[1]), radius, rgb)


def _jitter(rng: random.Random, rgb: tuple[int, int, int]) -> tuple[int, int, int]:
    r, g, b = (min(255, max(0, v + rng.randint(-_COLOR_JITTER, _COLOR_JITTER))) for v in rgb)
    return r, g, b


def _draw(draw: ImageDraw.ImageDraw, thing: Thing) -> None:
    (x, y), r = thing.center, thing.radius
    if thing.shape == "circle":
        draw.ellipse((x - r, y - r, x + r, y + r), fill=thing.rgb)
    elif thing.shape == "square":
        draw.rectangle((x - r, y - r, x + r, y + r), fill=thing.rgb)
    elif thing.shape == "triangle":
        draw.polygon([(x, y - r), (x + r, y + r), (x - r, y + r)], fill=thing.rgb)
    else:
        arm = r // 3
        draw.rectangle((x - arm, y - r, x + arm, y + r), fill=thing.rgb)
        draw.rectangle((x - r, y - arm, x + r, y + arm), fill=thing.rgb)
