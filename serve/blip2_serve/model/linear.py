"""Linear layers whose weights lie as oneDNN wants them, for CPUs.

A plain `nn.Linear` reads its weight row by row; for the few rows of a decode step, oneDNN then
reaches a third of the memory's bandwidth (DESIGN.md has the figures). An activation that follows
is computed on the products before they are rounded and written.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

# Four rows take less time than one; and a number of rows that was not seen lately costs 3 ms, so
# there had better be few different ones.
ROW_MULTIPLE = 4

FUSED_ACTIVATIONS = ("relu", "gelu")  # by transformers' names, which here are oneDNN's as well


class PackedLinear(nn.Module):
    """A linear layer without its weight's plain form, and one of FUSED_ACTIVATIONS behind it."""

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


def pack_linears(module: nn.Module) -> None:
    """Replaces every linear layer inside `module`, where this build and dtype allow it.

    A weight that is shared with another module (a tied head) is copied.
    """
    for name, child in module.named_children():
        if isinstance(child, nn.Linear) and packable(child.weight):
            setattr(module, name, PackedLinear(child.weight, child.bias))
        else:
            pack_linears(child)


def pack_with_activation(module: nn.Module, linear: str, activation: str, name: str) -> None:
    """Makes one layer of two of `module`'s, of which the second is the activation of that name."""
    layer = getattr(module, linear)
    if name in FUSED_ACTIVATIONS and packable(layer.weight):
        setattr(module, linear, PackedLinear(layer.weight, layer.bias, name))
        setattr(module, activation, nn.Identity())


def packable(weight: Tensor) -> bool:
    """Whether this build packs weights of that dtype on that device."""
    return (
        weight.device.type == "cpu"
        and weight.dtype == torch.bfloat16
        and torch.backends.mkldnn.is_available()
        and torch.ops.mkldnn._is_mkldnn_bf16_supported()
    )
