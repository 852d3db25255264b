"""For `gpu.py`: the same random weights in transformers' model and in ours, and what they cost."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import count
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from transformers import Blip2Config, Blip2ForConditionalGeneration

from blip2_serve.compute.assembly import EngineLimits, assemble
from blip2_serve.compute.base import Device, Encode
from blip2_serve.compute.devices import open_device
from blip2_serve.compute.runner import slot_bytes
from blip2_serve.engine.engine import Engine
from blip2_serve.engine.sequence import Request
from blip2_serve.model.checkpoint import Checkpoint, open_checkpoint
from blip2_serve.model.decoder import OptDecoder
from blip2_serve.model.processor import ImageProcessor
from blip2_serve.model.source import DEMO
from blip2_serve.model.tokenizer import Tokenizer
from blip2_serve.model.vision import ImageEncoder
from blip2_serve.types import SamplingParams
from loadtest.bench.weights import draw_weights

PROMPT = [4, 5, 6]  # as long as "a photo of"
DEMO_TOKENS = 400  # the shipped checkpoint has a few more
STEP_TOKENS = 8192  # per step at most; more than the server's default, as suits a GPU
_names = count()


@dataclass(frozen=True)
class InMemory(Checkpoint):
    """A checkpoint that copies its tensors from a model."""

    tensors: Mapping[str, Tensor]

    def load(self, destinations: Mapping[str, Tensor], what: str) -> None:  # noqa: ARG002
        for name, destination in destinations.items():
            destination.copy_(self.tensors[name])


@dataclass(frozen=True)
class Models:
    """The same weights in transformers' model, in our encoder and in our decoder."""

    reference: Blip2ForConditionalGeneration
    encoder: ImageEncoder
    encode: Encode  # the encoder as the device runs it
    decoder: OptDecoder
    pad_to: int  # see Device.prepare_decoder
    device: Device

    @property
    def prompt(self) -> list[int]:
        config = self.reference.config
        image = [config.image_token_index] * config.num_query_tokens
        return [*image, config.text_config.bos_token_id, *PROMPT]


def make_models(
    config: Blip2Config, place: torch.device, dtype: torch.dtype, images: int
) -> Models:
    """Random weights with which the image changes the answer; batches of up to `images`."""
    torch.manual_seed(0)
    with torch.device(place):
        reference = Blip2ForConditionalGeneration(config).to(dtype).eval().requires_grad_(False)
    draw_weights(reference)
    # Without an end token, answers have their full length.
    reference.language_model.generation_config.eos_token_id = None
    size = config.vision_config.image_size
    processor = ImageProcessor(
        (size, size), (0.48, 0.46, 0.41), (0.27, 0.26, 0.28), 1 / 255, Image.Resampling.BICUBIC
    )
    checkpoint = InMemory(Path("memory"), config, {}, reference.state_dict())
    encoder = ImageEncoder.load(checkpoint, processor, place, dtype)
    decoder = OptDecoder.load(checkpoint, place, dtype)
    device = open_device(str(place))
    encode = device.prepare_encoder(encoder, images)
    return Models(reference, encoder, encode, decoder, device.prepare_decoder(decoder), device)


def make_engine(models: Models, running: int, longest: int) -> Engine:
    """An engine for `running` sequences of up to `longest` tokens."""
    limits = EngineLimits(
        max_num_seqs=running,
        max_waiting=1_000_000,
        max_num_batched_tokens=max(STEP_TOKENS, running + 1),
        kv_slots=running * longest,
    )
    return assemble(
        models.decoder,
        models.device,
        limits,
        pad_to=models.pad_to,
        min_len=1,
        max_len=longest,
        decode=decode_text,
        eos_token_ids=(),
    )


@cache
def _tokenizer() -> Tokenizer:
    checkpoint = open_checkpoint(DEMO, None)
    return Tokenizer(checkpoint.folder, checkpoint.config)


def decode_text(ids: list[int]) -> str:
    """Text of the shipped checkpoint's tokenizer: making it takes as long as real text does."""
    return _tokenizer().decode([token % DEMO_TOKENS for token in ids])


def add(
    models: Models,
    engine: Engine,
    features: Tensor,
    new_tokens: int,
    more: Sequence[int] = (),
    **sampling: Any,
) -> str:
    """Requests a caption of an image that the engine does not know. Returns the request's name.

    `more` tokens follow the prompt; `sampling` are further SamplingParams.
    """
    name = str(next(_names))
    params = SamplingParams(max_tokens=new_tokens, ignore_eos=True, **sampling)
    engine.add(Request(name, [*models.prompt, *more], features, digest=name, params=params))
    return name


def step(engine: Engine, tokens: dict[str, list[int]]) -> None:
    """Runs one step and appends its tokens by request."""
    for name, event in engine.step().events:
        tokens[name] += event.token_ids


def random_pixels(models: Models, images: int) -> Tensor:
    """uint8 [images, 3, size, size] in main memory, where the server has them too."""
    size = models.reference.config.vision_config.image_size
    pixels = models.device.host_tensor((images, 3, size, size), torch.uint8)
    return pixels.random_(0, 256, generator=torch.Generator().manual_seed(images))


def reference_answers(models: Models, pixels: Tensor, new_tokens: int) -> list[list[int]]:
    """transformers' greedy answers to uint8 [batch, 3, size, size]."""
    encoder, reference = models.encoder, models.reference
    raw = pixels.to(reference.device).float()
    normalised = (raw * encoder.rescale - encoder.mean) / encoder.std
    ids = torch.tensor([models.prompt] * len(pixels), device=reference.device)
    answers = reference.generate(
        pixel_values=normalised.to(encoder.dtype),
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=new_tokens,
        do_sample=False,
    )
    tokens: list[list[int]] = answers[:, -new_tokens:].tolist()
    return tokens


# -- costs: floating-point operations and bytes ----------------------------------------------------


def encoder_flops(config: Blip2Config) -> float:
    """The products of ViT, Q-Former and projection for one image."""
    vit, qformer = config.vision_config, config.qformer_config
    patches = (vit.image_size // vit.patch_size) ** 2
    tokens, width, queries = patches + 1, vit.hidden_size, config.num_query_tokens
    flops = 2.0 * patches * 3 * vit.patch_size**2 * width
    flops += vit.num_hidden_layers * _layer_flops(tokens, tokens, width, vit.intermediate_size)
    own = qformer.hidden_size
    flops += qformer.num_hidden_layers * _layer_flops(
        queries, queries, own, qformer.intermediate_size
    )
    crossing = math.ceil(qformer.num_hidden_layers / qformer.cross_attention_frequency)
    cross = 2 * tokens * 2 * width * own + 2 * queries * 2 * own**2 + 4 * queries * tokens * own
    return flops + crossing * cross + 2 * queries * own * config.text_config.hidden_size


def _layer_flops(queries: int, keys: int, width: int, inner: int) -> float:
    """The linear layers and the attention of a transformer layer."""
    return 2.0 * queries * (4 * width**2 + 2 * width * inner) + 4.0 * queries * keys * width


def decoder_flops(config: Blip2Config, tokens: int, answers: int) -> float:
    """`tokens` through all layers and `answers` of them through the head, without attention."""
    text = config.text_config
    layer = 4 * text.hidden_size**2 + 2 * text.hidden_size * text.ffn_dim
    head = text.hidden_size * text.vocab_size
    return 2.0 * (tokens * text.num_hidden_layers * layer + answers * head)


def step_bytes(decoder: OptDecoder, sequences: int, length: int) -> int:
    """The bytes a decode step must read: all weights, and the keys and values so far."""
    text = decoder.config
    layer = 4 * text.hidden_size**2 + 2 * text.hidden_size * text.ffn_dim
    weights = text.num_hidden_layers * layer + text.hidden_size * text.vocab_size
    element = decoder.embed_tokens.weight.element_size()
    return weights * element + sequences * length * slot_bytes(decoder)
