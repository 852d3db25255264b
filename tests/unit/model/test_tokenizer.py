"""Prompts become the ids that the transformers processor gives, and no prompt is more than text."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from transformers import Blip2Processor

from blip2_serve.model.checkpoint import read_config
from blip2_serve.model.source import DEMO_FOLDER
from blip2_serve.model.tokenizer import Tokenizer

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


@given(st.text(max_size=40))
def test_the_bytes_of_a_texts_tokens_are_the_texts_bytes(text: str) -> None:
    ids = TOKENIZER.prompt_ids(text)[len(TOKENIZER.prompt_ids("")) :]
    assert b"".join(map(TOKENIZER.token_bytes, ids)) == text.encode()


def test_every_byte_is_a_token_of_its_own() -> None:
    """So a text can be spelled whatever it is, and half a character can be a token."""
    vocabulary = {TOKENIZER.token_bytes(i) for i in range(CONFIG.text_config.vocab_size)}
    assert {bytes([byte]) for byte in range(256)} <= vocabulary


@pytest.mark.parametrize("name", ["</s>", "<pad>", "<image>"])
def test_a_special_token_stands_for_its_name(name: str) -> None:
    processor = Blip2Processor.from_pretrained(DEMO_FOLDER)
    token_id = processor.tokenizer.convert_tokens_to_ids(name)
    assert TOKENIZER.token_bytes(token_id) == name.encode()


@pytest.mark.parametrize("beyond", [0, 1, 5000])
def test_an_id_beyond_the_tokenizer_stands_for_its_number(beyond: int) -> None:
    """The embeddings of the real checkpoints have rows without a token: they can be generated."""
    token_id = len(Blip2Processor.from_pretrained(DEMO_FOLDER).tokenizer) + beyond
    assert TOKENIZER.token_bytes(token_id) == f"<{token_id}>".encode()
