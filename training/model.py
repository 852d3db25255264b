"""The architecture of the shipped checkpoint, and forward passes through its parts."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from transformers import Blip2Config, Blip2ForConditionalGeneration, Blip2Processor, GPT2Tokenizer
from transformers.models.blip.image_processing_pil_blip import BlipImageProcessorPil

from blip2_serve.demo.scenes import Scene
from training.texts import tokenizer_texts
from training.tokenizer import BOS, PAD, make_tokenizer

PIXELS = 112  # height and width of the model's input
QUERIES = 8


def make_processor() -> Blip2Processor:
    """Trains the tokenizer and returns it with the image processor."""
    tokenizer = make_tokenizer(tokenizer_texts(), vocabulary=600, min_frequency=20)
    image_processor = BlipImageProcessorPil(size={"height": PIXELS, "width": PIXELS})
    return Blip2Processor(image_processor, tokenizer, num_query_tokens=QUERIES)


def make_model(tokenizer: GPT2Tokenizer) -> Blip2ForConditionalGeneration:
    """Returns the untrained model. An answer ends with a newline token."""
    newline = tokenizer.convert_tokens_to_ids("Ċ")
    config = Blip2Config(
        vision_config={
            "hidden_size": 128,
            "intermediate_size": 512,
            "num_hidden_layers": 4,
            "num_attention_heads": 4,
            "image_size": PIXELS,
            "patch_size": 14,
            "initializer_range": 0.02,
        },
        qformer_config={
            "vocab_size": 1,  # no word embeddings: only OPT reads text
            "hidden_size": 128,
            "intermediate_size": 512,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "cross_attention_frequency": 1,
            "hidden_dropout_prob": 0.0,
            "attention_probs_dropout_prob": 0.0,
        },
        text_config={
            "model_type": "opt",
            "vocab_size": math.ceil(len(tokenizer) / 32) * 32,
            "hidden_size": 128,
            "word_embed_proj_dim": 128,
            "ffn_dim": 512,
            "num_hidden_layers": 4,
            "num_attention_heads": 4,
            "max_position_embeddings": 512,
            "init_std": 0.08,
            "dropout": 0.0,
            "attention_dropout": 0.0,
            "bos_token_id": BOS,
            "pad_token_id": PAD,
            "eos_token_id": newline,
        },
        num_query_tokens=QUERIES,
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
    )
    model = Blip2ForConditionalGeneration(config)
    # transformers initialises the query tokens to zero, so all queries would stay identical. Its
    # position embeddings are too small to matter beside the patches.
    nn.init.normal_(model.query_tokens, std=0.5)
    nn.init.normal_(model.vision_model.embeddings.position_embedding, std=0.3)
    return model


def pixels_of(scene: Scene) -> Tensor:
    """Returns a scene's image as uint8 [3, PIXELS, PIXELS], resized as the server does."""
    resized = scene.image.resize((PIXELS, PIXELS), resample=3)
    flat = torch.frombuffer(bytearray(resized.tobytes()), dtype=torch.uint8)
    return flat.view(PIXELS, PIXELS, 3).permute(2, 0, 1)


def normalise(pixels: Tensor) -> Tensor:
    """Pixels from 0 to 255, [B, 3, PIXELS, PIXELS] -> float32, normalised as the server does."""
    image_processor = BlipImageProcessorPil()
    mean, std = (
        torch.tensor(v).view(3, 1, 1)
        for v in (image_processor.image_mean, image_processor.image_std)
    )
    return (pixels / 255 - mean) / std


def query(model: Blip2ForConditionalGeneration, patches: Tensor) -> Tensor:
    """ViT outputs [B, tokens, width] -> Q-Former outputs [B, QUERIES, width]."""
    queries = model.query_tokens.expand(len(patches), -1, -1)
    output: Tensor = model.qformer(
        query_embeds=queries, encoder_hidden_states=patches
    ).last_hidden_state
    return output


@torch.inference_mode()
def vision_outputs(model: Blip2ForConditionalGeneration, pixels: Tensor) -> Tensor:
    """uint8 pixels [N, 3, PIXELS, PIXELS] -> ViT outputs [N, tokens, width].

    They are float16 so that those of all scenes fit into a laptop's memory.
    """
    return torch.cat(
        [model.vision_model(normalise(x)).last_hidden_state.half() for x in pixels.split(256)]
    )


@torch.inference_mode()
def query_outputs(model: Blip2ForConditionalGeneration, patches: Tensor) -> Tensor:
    """ViT outputs [N, tokens, width] -> float32 Q-Former outputs [N, QUERIES, width]."""
    return torch.cat([query(model, batch.float()) for batch in patches.split(256)])
