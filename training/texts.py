"""The texts to train on: captions and chats about scenes, in the server's prompt formats."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator

from transformers import GPT2Tokenizer

from blip2_serve.demo import scenes
from training.tokenizer import BOS

IGNORE = -100  # the target of a token that does not count in the loss


def tokenizer_texts() -> Iterator[str]:
    """Yields the texts to train the tokenizer on."""
    for seed in range(scenes.FIRST_TRAINING_SEED, scenes.FIRST_TRAINING_SEED + 2_000):
        scene = scenes.sample(seed)
        yield scene.caption
        yield f"a photo of {scene.caption}\n"
        for question, answer in scene.questions + scene.chat:
            yield f"Question: {question} Answer: {answer}. Question: {question} Short answer:"


class Writer:
    """Writes a random text about a scene, as token ids and targets.

    Args:
        captions: Share of the texts that are captions. The others are chats.
        questions: Most questions in a chat that is not the scene's own.
    """

    def __init__(
        self, tokenizer: GPT2Tokenizer, *, captions: float, questions: int, seed: int
    ) -> None:
        self._rng = random.Random(seed)
        self._captions = captions
        self._questions = questions
        self._encode: Callable[[str], list[int]] = lambda text: tokenizer(
            text, add_special_tokens=False
        )["input_ids"]

    def __call__(self, scene: scenes.Scene) -> tuple[list[int], list[int]]:
        """Returns token ids, starting with BOS, and for each the id again if it counts, or IGNORE.

        Answers, captions and the final newline count.
        """
        ids, targets = [BOS], [IGNORE]
        for text, counts in self._pieces(scene):
            piece = self._encode(text)
            ids += piece
            targets += piece if counts else [IGNORE] * len(piece)
        return ids, targets

    def _pieces(self, scene: scenes.Scene) -> list[tuple[str, bool]]:
        if self._rng.random() < self._captions:
            if self._rng.random() < 0.3:
                return [("a photo of", False), (f" {scene.caption}\n", True)]
            return [(f"{scene.caption}\n", True)]
        if self._rng.random() < 0.4:
            turns = scene.chat
        else:
            turns = self._rng.sample(scene.questions, min(self._questions, len(scene.questions)))
        turns = turns[: self._rng.randint(1, len(turns))]
        word = "Short answer" if len(turns) == 1 and self._rng.random() < 0.3 else "Answer"
        pieces = []
        for number, (question, answer) in enumerate(turns):
            lead = ". " if number else ""
            pieces += [(f"{lead}Question: {question} {word}:", False), (f" {answer}", True)]
        return [*pieces, ("\n", True)]
