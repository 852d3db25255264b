"""Linear layers in bfloat16 for CPUs, with their weights as the products want them.

A plain `nn.Linear` reads its weight row by row; for the few rows of a decode step, oneDNN then
reaches a third of the memory's bandwidth, with weights in its own layout two thirds, and the kernel
of `kernels/dot_product.py` all of it (DESIGN.md has the figures). An activation that follows is
computed on the products before they are rounded and written.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

# Of OneDnnLinear: four rows take less time than one; and a number of rows that was not seen lately
# costs 3 ms, so there had better be few different ones.
ROW_MULTIPLE = 4


class OneDnnLinear(nn.Module):
    """A linear layer with its weight in oneDNN's layout, and one of ACTIVATIONS behind it."""

    ACTIVATIONS = ("none", "relu", "gelu")  # by transformers' names, which are oneDNN's as well

    def __init__(self, weight: Tensor, bias: Tensor | None, activation: str = "none") -> None:
        """`weight` is [out_features, in_features]."""
        super().__init__()
        self._weight = torch.ops.mkldnn._reorder_linear_weight(weight.detach(), 1)
        self._bias = None if bias is None else bias.detach()
        self._activation = activation

    def forward(self, x: Tensor) -> Tensor:
        """[..., in_features] -> [..., out_features]."""
        y: Tensor = torch.ops.mkldnn._linear_pointwise(
            x, self._weight, self._bias, self._activation, [], "none"
        )
        return y


class DotLinear(nn.Module):
    """A linear layer by the kernel, and one of ACTIVATIONS behind it."""

    ACTIVATIONS = ("none", "relu")

    def __init__(self, weight: Tensor, bias: Tensor | None, activation: str = "none") -> None:
        """`weight` is [out_features, in_features]."""
        # Here, so that what runs on a GPU needs no numba.
        from blip2_serve.compute.cpu import dot_product

        super().__init__()
        self._linear = dot_product.linear
        self._weight = dot_product.packed(weight.detach())
        zeros = torch.zeros(len(weight), device=weight.device)
        self._bias = zeros if bias is None else bias.detach().float()
        self._relu = activation == "relu"
        dot_product.kernel()  # or the first request would wait for it

    def forward(self, x: Tensor) -> Tensor:
        """[rows, in_features] -> [rows, out_features]."""
        return self._linear(x, self._weight, self._bias, relu=self._relu)


# A layer and the activation behind it, "none" if there is none -> both in one, if it can be done.
Pack = Callable[[nn.Linear, str], nn.Module | None]


def for_many_rows(layer: nn.Linear, activation: str) -> nn.Module | None:
    """What is best for whole images."""
    if not packable(layer.weight) or activation not in OneDnnLinear.ACTIVATIONS:
        return None
    return OneDnnLinear(layer.weight, layer.bias, activation)


def for_few_rows(layer: nn.Linear, activation: str) -> nn.Module | None:
    """What is best for decode steps."""
    if not packable(layer.weight) or not _fits_kernel(layer.weight):
        return for_many_rows(layer, activation)
    if activation not in DotLinear.ACTIVATIONS:
        return None
    return DotLinear(layer.weight, layer.bias, activation)


def pack_linears(module: nn.Module, pack: Pack) -> None:
    """Replaces every linear layer inside `module`, where this build, CPU and dtype allow it.

    A weight that is shared with another module (a tied head) is copied.
    """
    for name, child in module.named_children():
        if isinstance(child, nn.Linear):
            setattr(module, name, pack(child, "none") or child)
        else:
            pack_linears(child, pack)


def pack_with_activation(
    module: nn.Module, linear: str, activation: str, name: str, pack: Pack
) -> None:
    """Makes one layer of two of `module`'s, of which the second is the activation of that name."""
    packed = pack(getattr(module, linear), name)
    if packed:
        setattr(module, linear, packed)
        setattr(module, activation, nn.Identity())


def packable(weight: Tensor) -> bool:
    """Whether this build packs weights of that dtype on that device."""
    return (
        weight.device.type == "cpu"
        and weight.dtype == torch.bfloat16
        and torch.backends.mkldnn.is_available()
        and torch.ops.mkldnn._is_mkldnn_bf16_supported()
    )


def _fits_kernel(weight: Tensor) -> bool:
    from blip2_serve.compute.cpu import dot_product

    return dot_product.available() and dot_product.fits(weight)
