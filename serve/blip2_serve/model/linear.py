"""Linear layers whose weights lie as oneDNN wants them, for CPUs.

A plain `nn.Linear` reads its weight row by row; for the few rows of a decode step, oneDNN then
reaches a third of the memory's bandwidth (DESIGN.md has the figures).
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

# Four rows take less time than one; and a number of rows that was not seen lately costs 3 ms, so
# there had better be few different ones.
ROW_MULTIPLE = 4


class PackedLinear(nn.Module):
    """An `nn.Linear` without its weight's plain form."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self._weight = torch.ops.mkldnn._reorder_linear_weight(linear.weight.detach(), 1)
        self._bias = linear.bias

    def forward(self, x: Tensor) -> Tensor:
        """[..., in_features] -> [..., out_features]."""
        y: Tensor = torch.ops.mkldnn._linear_pointwise(x, self._weight, self._bias, "none", [], "")
        return y


def pack_linears(module: nn.Module) -> None:
    """Replaces every linear layer inside `module`, where this build and dtype allow it.

    A weight that is shared with another module (a tied head) is copied.
    """
    for name, child in module.named_children():
        if isinstance(child, nn.Linear) and _packable(child):
            setattr(module, name, PackedLinear(child))
        else:
            pack_linears(child)


def _packable(linear: nn.Linear) -> bool:
    return (
        linear.weight.device.type == "cpu"
        and linear.weight.dtype == torch.bfloat16
        and torch.backends.mkldnn.is_available()
        and torch.ops.mkldnn._is_mkldnn_bf16_supported()
    )
