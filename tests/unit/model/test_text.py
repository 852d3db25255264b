"""Prompts become the ids that the transformers processor gives, and no prompt is more than text."""

from __future__ import annotations

import pytest
from PIL import Image
from transformers import Blip2Processor

from blip2_serve.model.checkpoint import read_config
from blip2_serve.model.source import DEMO_FOLDER
from blip2_serve.model.text import Tokenizer

CONFIG = read_config(DEMO_FOLDER)
TOKENIZER = Tokenizer(DEMO_FOLDER, CONFIG)


@pytest.mark.parametrize(
    "prompt",
    ["", "a photo of", "Question: what color is it? Answer:", " naïve 東京 😀\n", "  spaces  "],
)
def test_prompt_ids_are_those_of_the_processor(prompt: str) -> None:
    processor = Blip2Processor.from_pretrained(DEMO_FOLDER)
    wanted = processor(images=Image.new("RGB", (9, 9)), text=prompt)["input_ids"][0]
    assert TOKENIZER.prompt_ids(prompt) == wanted


@pytest.mark.parametrize("special", ["<image>", "</s>", "<pad>", "<s>"])
def test_special_tokens_in_a_prompt_are_plain_text(special: str) -> None:
    front = TOKENIZER.prompt_ids("")
    ids = TOKENIZER.prompt_ids(f"a {special} b")
    assert ids[: len(front)] == front
    assert TOKENIZER.decode(ids[len(front) :]) == f"a {special} b"
    assert CONFIG.image_token_index not in ids[len(front) :]


def test_decoding_leaves_special_tokens_out() -> None:
    ids = TOKENIZER.prompt_ids("red circle")
    assert TOKENIZER.decode(ids) == "red circle"
