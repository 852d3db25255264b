"""The vision modules, with the parts replaced that are slow in bfloat16 on a CPU.

Linear layers are packed together with the activations behind them. The convolution over patches,
which do not overlap, becomes a linear layer, and attention two matrix products per image.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from blip2_serve.compute.cpu.linear import OneDnnLinear, for_images, packable
from blip2_serve.model.packing import replace_linears, replace_with_activation
from blip2_serve.model.qformer import Heads
from blip2_serve.model.vision import ImageEncoder
from blip2_serve.model.vit import SelfAttention


def pack_vision(encoder: ImageEncoder) -> None:
    """Replaces what is slow; does nothing where this build of torch cannot pack the dtype."""
    vision, qformer = encoder.vision_model, encoder.qformer
    convolution = vision.embeddings.patch_embedding
    if not packable(convolution.weight):
        return
    vision.embeddings.patch_embedding = PackedPatches(convolution)  # type: ignore[assignment]
    for layer in vision.encoder:
        name = vision.config.hidden_act
        replace_with_activation(layer.mlp, "fc1", "activation_fn", name, for_images)
    for block in qformer.encoder:
        part = block.intermediate_query
        name = qformer.config.hidden_act
        replace_with_activation(part, "dense", "intermediate_act_fn", name, for_images)
    replace_linears(encoder, for_images)
    for module in encoder.modules():
        if isinstance(module, (SelfAttention, Heads)):
            module.attend = attend


class PackedPatches(nn.Module):
    """A convolution whose stride is its kernel size, as a linear layer over each patch."""

    def __init__(self, convolution: nn.Conv2d) -> None:
        super().__init__()
        assert convolution.stride == convolution.kernel_size
        self._size = convolution.kernel_size[0]
        self._linear = OneDnnLinear(convolution.weight.flatten(1), convolution.bias)

    def forward(self, pixels: Tensor) -> Tensor:
        """[B, channels, H, W] -> [B, out channels, H / size, W / size]."""
        size = self._size
        patches = pixels.unflatten(3, (-1, size)).unflatten(2, (-1, size)).permute(0, 2, 4, 1, 3, 5)
        rows, columns = patches.shape[1:3]
        seen: Tensor = self._linear(patches.flatten(3).flatten(1, 2))
        grid: Tensor = seen.mT.unflatten(2, (rows, columns))
        return grid


def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """An `Attend`: one image at a time, so that its scores stay in the cache."""
    scale = query.shape[-1] ** -0.5
    attended = query.new_empty(query.transpose(1, 2).shape)
    for q, k, v, out in zip(query, key, value, attended, strict=True):
        scores = torch.bmm(q, k.transpose(1, 2)).mul_(scale)
        out.copy_(torch.bmm(scores.softmax(-1), v).transpose(0, 1))
    return attended
