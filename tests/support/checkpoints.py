"""Random BLIP-2 checkpoints whose answers depend on the image."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from transformers import (
    Blip2Config,
    Blip2ForConditionalGeneration,
    Blip2Processor,
    GPT2Tokenizer,
)
from transformers.models.blip.image_processing_pil_blip import BlipImageProcessorPil

from blip2_serve.demo import scenes
from blip2_serve.model.checkpoint import open_checkpoint
from blip2_serve.model.processor import ImageProcessor
from blip2_serve.model.vision import ImageEncoder
from training.tokenizer import make_tokenizer


@dataclass(frozen=True)
class Recipe:
    """Describes a random checkpoint. `layout` is the format of its weights on disk."""

    name: str
    seed: int
    image_size: int = 56
    vision_width: int = 64
    vision_layers: int = 2
    queries: int = 8
    qformer_width: int = 48
    width: int = 64
    layers: int = 2
    heads: int = 4
    vocabulary: int = 320
    positions: int = 256
    tied: bool = True
    eos: int | list[int] | None = None  # None: the newline token
    layout: Literal["single", "sharded", "bin"] = "single"
    shard_size: str = "200KB"
    text: dict[str, Any] = field(default_factory=dict)
    vision: dict[str, Any] = field(default_factory=dict)
    qformer: dict[str, Any] = field(default_factory=dict)


def write_checkpoint(folder: Path, recipe: Recipe) -> Path:
    """Writes model and processor in transformers' format; equal recipes give equal files."""
    folder.mkdir(parents=True, exist_ok=True)
    captions = [scenes.sample(seed).caption for seed in range(200)]
    tokenizer = make_tokenizer(captions, vocabulary=recipe.vocabulary - 1, min_frequency=0)
    tokenizer.add_tokens("<image>", special_tokens=True)
    image_processor = BlipImageProcessorPil(
        size={"height": recipe.image_size, "width": recipe.image_size}
    )
    processor = Blip2Processor(image_processor, tokenizer, num_query_tokens=recipe.queries)
    model = make_model(recipe, tokenizer)
    match recipe.layout:
        case "single":
            model.save_pretrained(folder)
        case "sharded":
            model.save_pretrained(folder, max_shard_size=recipe.shard_size)
        case "bin":
            _save_as_bin(model, folder)
    processor.save_pretrained(folder)
    return folder


def load_encoder(folder: Path, dtype: torch.dtype = torch.float32) -> ImageEncoder:
    """Loads the image encoder of a checkpoint on the CPU."""
    checkpoint = open_checkpoint(str(folder))
    return ImageEncoder.load(checkpoint, ImageProcessor.load(folder), torch.device("cpu"), dtype)


def make_model(recipe: Recipe, tokenizer: GPT2Tokenizer) -> Blip2ForConditionalGeneration:
    newline = tokenizer.convert_tokens_to_ids("Ċ")
    config = Blip2Config(
        vision_config={
            "hidden_size": recipe.vision_width,
            "intermediate_size": 2 * recipe.vision_width,
            "num_hidden_layers": recipe.vision_layers,
            "num_attention_heads": 4,
            "image_size": recipe.image_size,
            "patch_size": 14,
            **recipe.vision,
        },
        qformer_config={
            "vocab_size": 1,
            "hidden_size": recipe.qformer_width,
            "intermediate_size": 2 * recipe.qformer_width,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "cross_attention_frequency": 2,
            **recipe.qformer,
        },
        text_config={
            "model_type": "opt",
            # Like the real checkpoints, it has more ids than the tokenizer has tokens.
            "vocab_size": math.ceil((len(tokenizer) + 2) / 8) * 8,
            "hidden_size": recipe.width,
            "word_embed_proj_dim": recipe.width,
            "ffn_dim": 2 * recipe.width,
            "num_hidden_layers": recipe.layers,
            "num_attention_heads": recipe.heads,
            "max_position_embeddings": recipe.positions,
            "bos_token_id": 2,
            "pad_token_id": 1,
            "eos_token_id": newline if recipe.eos is None else recipe.eos,
            "tie_word_embeddings": recipe.tied,
            **recipe.text,
        },
        num_query_tokens=recipe.queries,
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
    )
    torch.manual_seed(recipe.seed)
    model = Blip2ForConditionalGeneration(config).eval()
    # With transformers' initialisation, answers would not depend on the image: the ViT has a std of
    # 1e-10, and the query tokens are zero.
    for name, parameter in model.named_parameters():
        nn.init.normal_(parameter, std=_std(name, parameter))
        if "norm" in name.lower() and name.endswith("weight"):
            nn.init.ones_(parameter)
    return model


def _std(name: str, parameter: Tensor) -> float:
    if name.endswith("bias"):
        return 0.1
    if "query_tokens" in name or ("embed" in name and "patch" not in name):
        return 0.5
    return 1.5 / math.sqrt(parameter[0].numel())


def _save_as_bin(model: Blip2ForConditionalGeneration, folder: Path) -> None:
    """Writes two pytorch_model-*.bin and their index, the format of older checkpoints."""
    model.config.save_pretrained(folder)
    tensors = {name: t.clone() for name, t in model.state_dict().items()}
    names = sorted(tensors)
    weight_map = {}
    for number, part in enumerate((names[::2], names[1::2]), start=1):
        file = f"pytorch_model-{number:05}-of-00002.bin"
        torch.save({name: tensors[name] for name in part}, folder / file)
        weight_map |= dict.fromkeys(part, file)
    index = {"metadata": {}, "weight_map": weight_map}
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps(index))
