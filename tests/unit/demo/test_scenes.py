"""Scenes and the texts about them agree."""

from __future__ import annotations

import re

import pytest

from blip2_serve.demo import scenes
from blip2_serve.demo.scenes import Scene, Thing

SEEDS = range(300)


@pytest.fixture(scope="module")
def sampled() -> list[Scene]:
    return [scenes.sample(seed) for seed in SEEDS]


def test_equal_seeds_give_equal_scenes() -> None:
    one, other = scenes.sample(7), scenes.sample(7)

    assert one == other
    assert one.image.tobytes() == other.image.tobytes()
    assert (one.caption, one.questions, one.chat) == (other.caption, other.questions, other.chat)


def test_different_seeds_give_different_images(sampled: list[Scene]) -> None:
    assert len({scene.image.tobytes() for scene in sampled}) == len(SEEDS)


def test_images_are_224_by_224_rgb() -> None:
    image = scenes.sample(0).image

    assert image.size == (224, 224)
    assert image.mode == "RGB"


def test_a_scene_has_one_to_three_shapes_in_different_quarters(sampled: list[Scene]) -> None:
    assert {len(scene.things) for scene in sampled} == {1, 2, 3}
    for scene in sampled:
        assert len({thing.position for thing in scene.things}) == len(scene.things)
        for thing in scene.things:
            x, y = thing.center
            left = 112 * thing.position.endswith("right")
            top = 112 * thing.position.startswith("bottom")
            assert left < x - thing.radius < x + thing.radius < left + 112
            assert top < y - thing.radius < y + thing.radius < top + 112


def test_the_image_shows_every_shape_in_its_color(
    sampled: list[Scene],
) -> None:
    for scene in sampled:
        corners = [(x, y) for x in (0, 223) for y in (0, 223)]
        assert {scene.image.getpixel(c) for c in corners} == {scene.background_rgb}
        for thing in scene.things:
            assert scene.image.getpixel(thing.center) == thing.rgb
            assert named(thing.rgb, scenes.COLORS) == thing.color
        assert named(scene.background_rgb, scenes.BACKGROUNDS) == scene.background


def test_large_shapes_are_larger_than_small_ones(sampled: list[Scene]) -> None:
    radii = {
        size: [t.radius for scene in sampled for t in scene.things if t.size == size]
        for size in scenes.SIZES
    }

    assert max(radii["small"]) < min(radii["large"])


def test_the_caption_lists_every_shape_in_reading_order(sampled: list[Scene]) -> None:
    for scene in sampled:
        order = [scenes.POSITIONS.index(thing.position) for thing in scene.things]
        listed = [f"a {t.size} {t.color} {t.shape} at the {t.position}" for t in scene.things]
        at = [scene.caption.index(text) for text in listed]
        assert order == sorted(order)
        assert at == sorted(at)
        assert scene.caption.count(" at the ") == len(listed)
        assert scene.caption.endswith(f" on a {scene.background} background")


def test_every_answer_is_true_of_the_scene(sampled: list[Scene]) -> None:
    for scene in sampled:
        for question, answer in scene.questions:
            assert answer == truth(scene, question), (scene.seed, question)


def test_every_kind_of_question_is_asked(sampled: list[Scene]) -> None:
    questions = {q for scene in sampled for q, _ in scene.questions}

    assert {kind for kind in KINDS if any(re.fullmatch(kind, q) for q in questions)} == set(KINDS)


def test_yes_and_no_are_both_common(sampled: list[Scene]) -> None:
    answers = [a for scene in sampled for q, a in scene.questions if q.startswith("is there")]

    assert answers.count("yes") > len(answers) / 3
    assert answers.count("no") > len(answers) / 3


def test_a_chat_asks_about_a_shape_and_refers_back_to_it(sampled: list[Scene]) -> None:
    for scene in sampled:
        (first, found), (second, answer), *others = scene.chat
        position = first.removeprefix("what is at the ").removesuffix("?")
        thing = next(t for t in scene.things if t.position == position)
        assert found == str(thing)
        about_it = {
            "what color is it?": thing.color,
            "what shape is it?": thing.shape,
            "is it small or large?": thing.size,
        }
        assert answer == about_it[second]
        for question, other in others:
            assert other == truth(scene, question)


KINDS = (
    r"how many shapes are there\?",
    r"what color is the background\?",
    r"what is at the (?P<position>.+)\?",
    r"is there an? (?P<color>\w+) (?P<shape>\w+)\?",
    r"what color is the (?P<shape>\w+)\?",
    r"where is the (?P<shape>\w+)\?",
    r"is the (?P<shape>\w+) small or large\?",
    r"what shape is (?P<color>\w+)\?",
)


def truth(scene: Scene, question: str) -> str:
    """Answers a question from the scene's shapes; fails if there is more than one answer."""

    def the(**given: str) -> Thing:
        (thing,) = (t for t in scene.things if all(getattr(t, k) == v for k, v in given.items()))
        return thing

    match question.removesuffix("?").split():
        case ["how", "many", *_]:
            return ["zero", "one", "two", "three"][len(scene.things)]
        case ["what", "color", "is", "the", "background"]:
            return scene.background
        case ["what", "is", "at", "the", *position]:
            here = [t for t in scene.things if t.position == " ".join(position)]
            return f"a {here[0].size} {here[0].color} {here[0].shape}" if here else "nothing"
        case ["is", "there", "a" | "an", color, shape]:
            found = any((t.color, t.shape) == (color, shape) for t in scene.things)
            return "yes" if found else "no"
        case ["what", "color", "is", "the", shape]:
            return the(shape=shape).color
        case ["where", "is", "the", shape]:
            return the(shape=shape).position
        case ["is", "the", shape, "small", "or", "large"]:
            return the(shape=shape).size
        case ["what", "shape", "is", color]:
            return the(color=color).shape
    raise AssertionError(f"unknown question {question!r}")


def named(rgb: tuple[int, int, int], names: dict[str, tuple[int, int, int]]) -> str:
    """Returns the name of the nearest color."""
    return min(names, key=lambda n: sum((a - b) ** 2 for a, b in zip(rgb, names[n], strict=True)))
