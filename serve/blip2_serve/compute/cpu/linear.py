"""Linear layers in bfloat16 for CPUs, with weights laid out as the products read them.

A plain `nn.Linear` reads its weight row by row. For the few rows of a decode step, oneDNN reaches a
third of the memory bandwidth that way, two thirds with weights in its own layout, and the kernel in
`dot_product.py` all of it. An activation behind the layer is applied before results are rounded.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from blip2_serve.compute.cpu import dot_product
from blip2_serve.model.packing import MakeLinear

# For OneDnnLinear in decode steps: four rows take less time than one, and each number of rows not
# seen lately costs 3 ms, so fewer different numbers are better.
ROW_MULTIPLE = 4


class OneDnnLinear(nn.Module):
    """A linear layer with its weight in oneDNN's layout, and one of ACTIVATIONS behind it."""

    ACTIVATIONS = ("none", "relu", "gelu")  # transformers' names and oneDNN's alike

    def __init__(self, weight: Tensor, bias: Tensor | None, activation: str = "none") -> None:
        """`weight` is bfloat16 [out_features, in_features]."""
        super().__init__()
        self._weight = torch.ops.mkldnn._reorder_linear_weight(weight.detach(), 1)
        self._bias = None if bias is None else bias.detach()
        self._activation = activation

    def forward(self, x: Tensor) -> Tensor:
        """bfloat16 [..., in_features] -> [..., out_features]."""
        y: Tensor = torch.ops.mkldnn._linear_pointwise(
            x, self._weight, self._bias, self._activation, [], "none"
        )
        return y


class DotLinear(nn.Module):
    """A linear layer by the kernel of `dot_product.py`, and one of ACTIVATIONS behind it."""

    ACTIVATIONS = ("none", "relu")

    def __init__(self, weight: Tensor, bias: Tensor | None, activation: str = "none") -> None:
        """`weight` is bfloat16 [out_features, in_features]."""
        super().__init__()
        self._weight = dot_product.packed(weight.detach())
        zeros = torch.zeros(len(weight), device=weight.device)
        self._bias = zeros if bias is None else bias.detach().float()
        self._relu = activation == "relu"
        dot_product.kernel()  # compiles now: the first request would wait for it

    def forward(self, x: Tensor) -> Tensor:
        """bfloat16 [rows, in_features] -> [rows, out_features]."""
        return dot_product.linear(x, self._weight, self._bias, relu=self._relu)


def for_images(layer: nn.Linear, activation: str) -> nn.Module | None:
    """A `MakeLinear` for the many rows of whole images; also for decoders without the kernel."""
    if not packable(layer.weight) or activation not in OneDnnLinear.ACTIVATIONS:
        return None
    return OneDnnLinear(layer.weight, layer.bias, activation)


def for_few_rows(layer: nn.Linear, activation: str) -> nn.Module | None:
    """A `MakeLinear` for decode steps on CPUs that the kernel is made for."""
    if not packable(layer.weight) or not dot_product.fits(layer.weight):
        return for_images(layer, activation)
    if activation not in DotLinear.ACTIVATIONS:
        return None
    return DotLinear(layer.weight, layer.bias, activation)


def for_decode(dtype: torch.dtype) -> tuple[MakeLinear, int]:
    """How to make a decoder's layers, and the multiple of rows that they are fastest for."""
    if dot_product.available():
        return for_few_rows, 1
    packs = packable(torch.empty(0, dtype=dtype))
    return for_images, ROW_MULTIPLE if packs else 1


def packable(weight: Tensor) -> bool:
    """Whether this build of torch packs weights of that dtype on that device."""
    return (
        weight.device.type == "cpu"
        and weight.dtype == torch.bfloat16
        and torch.backends.mkldnn.is_available()
        and torch.ops.mkldnn._is_mkldnn_bf16_supported()
    )
