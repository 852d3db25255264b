"""The benchmark's checkpoint: a BLIP-2 of 108M random parameters that answers in words.

Large enough that computing dominates, small enough for two CPU cores. Equal on every machine.
"""

from __future__ import annotations

import contextlib
import random
import tempfile
from collections.abc import Iterator
from pathlib import Path

import torch
from transformers import Blip2Config, Blip2ForConditionalGeneration, Blip2Processor
from transformers.models.blip.image_processing_pil_blip import BlipImageProcessorPil

from bench.shapes import draw_weights
from bench.workload import WORDS
from training.tokenizer import make_tokenizer

SEED = 0
VOCABULARY = 8064
QUERIES = 32
PIXELS = 224
SINGLE_BYTES = 4 + 256  # the first ids: special tokens, then one for every byte


@contextlib.contextmanager
def checkpoint_at(folder: Path | None) -> Iterator[Path]:
    """The checkpoint in `folder`, written if there is none; without a folder, for the block."""
    with contextlib.ExitStack() as stack:
        if folder is None:
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory()), "blip2-108m")
        if not (folder / "config.json").exists():
            write_checkpoint(folder)
        yield folder


def write_checkpoint(folder: Path) -> None:
    """Writes model (bfloat16) and processor as transformers does."""
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer = make_tokenizer(_texts(), vocabulary=VOCABULARY - 1, min_frequency=0)
    image_processor = BlipImageProcessorPil(size={"height": PIXELS, "width": PIXELS})
    # Adds the image token to the tokenizer, as its last.
    processor = Blip2Processor(image_processor, tokenizer, num_query_tokens=QUERIES)
    assert len(tokenizer) == VOCABULARY
    processor.save_pretrained(folder)
    make_model(tokenizer.convert_tokens_to_ids("<image>")).bfloat16().save_pretrained(folder)


def make_model(image_token: int) -> Blip2ForConditionalGeneration:
    """Random weights, at scales that let the image and the question change the answer."""
    config = Blip2Config(
        vision_config={
            "hidden_size": 384,
            "intermediate_size": 1536,
            "num_hidden_layers": 6,
            "num_attention_heads": 6,
            "image_size": PIXELS,
            "patch_size": 14,
        },
        qformer_config={
            "vocab_size": 1,  # text goes to OPT only: no word embeddings are used
            "hidden_size": 256,
            "intermediate_size": 1024,
            "num_hidden_layers": 4,
            "num_attention_heads": 4,
            "cross_attention_frequency": 2,
        },
        text_config={
            "model_type": "opt",
            "vocab_size": VOCABULARY,
            "hidden_size": 768,
            "word_embed_proj_dim": 768,
            "ffn_dim": 3072,
            "num_hidden_layers": 12,
            "num_attention_heads": 12,
            "max_position_embeddings": 2048,
            "bos_token_id": 2,
            "pad_token_id": 1,
            "eos_token_id": 2,
            "tie_word_embeddings": True,
        },
        num_query_tokens=QUERIES,
        image_token_index=image_token,
    )
    torch.manual_seed(SEED)
    model = Blip2ForConditionalGeneration(config).eval()
    draw_weights(model)
    # A token whose embedding is zero has the logit zero, which never is the largest of thousands:
    # answers are whole characters from their first token on, so a stream shows when that came.
    words = model.get_input_embeddings().weight.data
    words[:SINGLE_BYTES] = 0
    words[image_token] = 0
    return model


def _texts() -> Iterator[str]:
    """The workload's words, and invented ones until there is something to merge."""
    yield from 100 * [" ".join(["Question: Answer:", *WORDS])]
    rng = random.Random(SEED)
    syllables = [a + b for a in "bcdfghjklmnprstvwz" for b in "aeiou"]
    for _ in range(12_000):
        yield " " + "".join(rng.choices(syllables, k=rng.randint(2, 4)))
