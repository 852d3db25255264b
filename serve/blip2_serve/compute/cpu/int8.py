"""Quantises the decoder's linear layers to int8 weights.

A decode step reads every weight once, so at few rows half the bytes of bfloat16 take half the time.
Weights are rounded to 8 bits with a scale for each output channel; `int8_product` keeps 16 bits of
activations, so in effect only the weights are quantised.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from blip2_serve.compute.cpu import int8_product
from blip2_serve.model.decoder import OptDecoder


class Int8Linear(nn.Module):
    """An `nn.Linear` with its weight rounded to int8, and one of ACTIVATIONS behind it."""

    ACTIVATIONS = ("none", "relu")

    def __init__(self, layer: nn.Linear, activation: str = "none") -> None:
        """Activations keep the layer's dtype: float32, bfloat16 or float16."""
        super().__init__()
        bias = torch.zeros(layer.out_features) if layer.bias is None else layer.bias.detach()
        self._weight = int8_product.packed(*quantized(layer.weight.detach()), bias)
        self._relu = activation == "relu"
        int8_product.kernel(layer.weight.dtype)  # compiles it, or the first request would wait

    def forward(self, x: Tensor) -> Tensor:
        """[rows, in_features] -> [rows, out_features]."""
        return int8_product.linear(x, self._weight, relu=self._relu)


def quantized(weight: Tensor) -> tuple[Tensor, Tensor]:
    """[out, in] -> int8 [out, in] between -127 and 127, and each channel's float32 scale [out]."""
    weight = weight.float()
    scales = weight.abs().amax(1).clamp_min(torch.finfo(torch.float32).tiny) / 127
    return (weight / scales[:, None]).round().to(torch.int8), scales


def quantize_decoder(decoder: OptDecoder) -> None:
    """Replaces the decoder's linear layers, freeing each plain weight before the next layer.

    A tied head becomes a copy. `devices.check_quantize` must have passed.
    """
    decoder.replace_linears(_quantized_layer)


def _quantized_layer(layer: nn.Linear, activation: str) -> nn.Module | None:
    return Int8Linear(layer, activation) if activation in Int8Linear.ACTIVATIONS else None
