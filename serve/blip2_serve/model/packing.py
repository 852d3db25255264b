"""Replaces a model's linear layers with ones that a device computes faster.

Each device provides its own `MakeLinear`. It receives a layer and the name of the activation that
follows it, and returns one module for both, or None to leave them as they are.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import nn

# (layer, transformers' name of the activation that follows or "none") -> both in one, or None
MakeLinear = Callable[[nn.Linear, str], nn.Module | None]


def replace_linears(module: nn.Module, make: MakeLinear) -> None:
    """Replaces every linear layer inside `module`, freeing each old weight before the next.

    A weight shared with another module, such as that of a tied head, is copied if `make` copies.
    """
    for name, child in module.named_children():
        if isinstance(child, nn.Linear):
            setattr(module, name, make(child, "none") or child)
        else:
            replace_linears(child, make)


def replace_with_activation(
    module: nn.Module, linear: str, activation: str, name: str, make: MakeLinear
) -> None:
    """Replaces `module`'s children `linear` and `activation` if `make` fuses them.

    `name` is transformers' name of the activation function.
    """
    fused = make(getattr(module, linear), name)
    if fused:
        setattr(module, linear, fused)
        setattr(module, activation, nn.Identity())
