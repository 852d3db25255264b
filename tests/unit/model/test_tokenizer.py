"""Prompts get the same token ids as from transformers' processor, and are only ever text."""

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
def test_prompt_ids_equal_those_of_transformers(prompt: str) -> None:
    processor = Blip2Processor.from_pretrained(DEMO_FOLDER)
    expected = processor(images=Image.new("RGB", (9, 9)), text=prompt)["input_ids"][0]
    assert TOKENIZER.prompt_ids(prompt) == expected


@pytest.mark.parametrize("special", ["<image>", "</s>", "<pad>", "<s>"])
def test_special_tokens_in_a_prompt_are_plain_text(special: str) -> None:
    """CVE-2026-44222: text that stood for a picture's place."""
    image_and_bos = TOKENIZER.prompt_ids("")
    ids = TOKENIZER.prompt_ids(f"a {special} b")
    assert ids[: len(image_and_bos)] == image_and_bos
    assert TOKENIZER.decode(ids[len(image_and_bos) :]) == f"a {special} b"
    assert CONFIG.image_token_index not in ids[len(image_and_bos) :]


def test_decoding_skips_special_tokens() -> None:
    ids = TOKENIZER.prompt_ids("red circle")
    assert TOKENIZER.decode(ids) == "red circle"


@given(st.text(max_size=40))
def test_token_bytes_add_up_to_the_text(text: str) -> None:
    ids = TOKENIZER.prompt_ids(text)[len(TOKENIZER.prompt_ids("")) :]
    assert b"".join(map(TOKENIZER.token_bytes, ids)) == text.encode()


def test_every_byte_has_its_own_token() -> None:
    """Any text can be tokenized, and a token can be half a character."""
    vocabulary = {TOKENIZER.token_bytes(i) for i in range(CONFIG.text_config.vocab_size)}
    assert {bytes([byte]) for byte in range(256)} <= vocabulary


@pytest.mark.parametrize("name", ["</s>", "<pad>", "<image>"])
def test_the_bytes_of_a_special_token_are_its_name(name: str) -> None:
    processor = Blip2Processor.from_pretrained(DEMO_FOLDER)
    token_id = processor.tokenizer.convert_tokens_to_ids(name)
    assert TOKENIZER.token_bytes(token_id) == name.encode()


@pytest.mark.parametrize("beyond", [0, 1, 5000])
def test_the_bytes_of_an_id_beyond_the_vocabulary_are_its_number(beyond: int) -> None:
    """The real checkpoints have more embeddings than tokens, so such ids can be generated."""
    token_id = len(Blip2Processor.from_pretrained(DEMO_FOLDER).tokenizer) + beyond
    assert TOKENIZER.token_bytes(token_id) == f"<{token_id}>".encode()
