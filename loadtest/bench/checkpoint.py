"""Checkpoints with random weights that answer in words, in any of the shapes.

The comparisons' has 108M parameters: computing dominates, and two CPU cores can still answer. It is
the same on every machine.
"""

from __future__ import annotations

import contextlib
import random
import tempfile
from collections.abc import Iterator
from pathlib import Path

import torch
from transformers import Blip2ForConditionalGeneration, Blip2Processor
from transformers.models.blip.image_processing_pil_blip import BlipImageProcessorPil

from loadtest.bench.weights import draw_weights, shape
from loadtest.bench.workload import WORDS
from training.tokenizer import make_tokenizer

SEED = 0
SINGLE_BYTES = 4 + 256  # the first ids: special tokens, then one for each byte


@contextlib.contextmanager
def checkpoint_at(folder: Path | None) -> Iterator[Path]:
    """The checkpoint in `folder`, written there if missing; None is a temporary folder."""
    with contextlib.ExitStack() as stack:
        if folder is None:
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory()), "blip2-108m")
        if not (folder / "config.json").exists():
            write_checkpoint(folder)
        yield folder


def write_checkpoint(
    folder: Path,
    name: str = "medium",
    device: str = "cpu",
    dtype: torch.dtype = torch.float32,
) -> None:
    """Saves model (bfloat16) and processor with transformers.

    The weights, of the shape `name`, are drawn on `device` in `dtype`: both change them.
    """
    folder.mkdir(parents=True, exist_ok=True)
    config = shape(name)
    pixels, vocabulary = config.vision_config.image_size, config.text_config.vocab_size
    tokenizer = make_tokenizer(_texts(), vocabulary=vocabulary - 1, min_frequency=0)
    image_processor = BlipImageProcessorPil(size={"height": pixels, "width": pixels})
    # Appends the image token to the tokenizer.
    processor = Blip2Processor(image_processor, tokenizer, num_query_tokens=config.num_query_tokens)
    image = config.image_token_index = tokenizer.convert_tokens_to_ids("<image>")
    assert image == len(tokenizer) - 1 < vocabulary
    processor.save_pretrained(folder)

    torch.manual_seed(SEED)
    with torch.device(device), _default_dtype(dtype):
        model = Blip2ForConditionalGeneration(config).eval()
    draw_weights(model)
    # Embeddings of zero give these tokens the logit 0, which is never the largest of thousands. So
    # every token is whole characters, and a stream shows when each of them arrives.
    words = model.get_input_embeddings().weight.data
    words[:SINGLE_BYTES] = 0
    words[image:] = 0  # the image token, and ids that the tokenizer lacks
    model.bfloat16().save_pretrained(folder)


@contextlib.contextmanager
def _default_dtype(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def _texts() -> Iterator[str]:
    """The workload's words, and invented ones until the vocabulary is full."""
    yield from 100 * [" ".join(["Question: Answer:", *WORDS])]
    rng = random.Random(SEED)
    syllables = [a + b for a in "bcdfghjklmnprstvwz" for b in "aeiou"]
    for _ in range(12_000):
        yield " " + "".join(rng.choices(syllables, k=rng.randint(2, 4)))
