"""Replaces a model's linear layers by others that compute the same. Knows no device.

A device has a `MakeLinear` of its own; it gets each layer with the name of the activation behind it
and returns one module for both, or None to leave them as they are.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import nn

# (layer, transformers' name of the activation behind it or "none") -> both in one, or None
MakeLinear = Callable[[nn.Linear, str], nn.Module | None]


def replace_linears(module: nn.Module, make: MakeLinear) -> None:
    """Replaces every linear layer inside `module`; each old weight is freed before the next.

    A weight shared with another module, such as a tied head, is copied.
    """
    for name, child in module.named_children():
        if isinstance(child, nn.Linear):
            setattr(module, name, make(child, "none") or child)
        else:
            replace_linears(child, make)


def replace_with_activation(
    module: nn.Module, linear: str, activation: str, name: str, make: MakeLinear
) -> None:
    """Replaces the child `linear` and the activation `name` behind it, if `make` fuses them."""
    fused = make(getattr(module, linear), name)
    if fused:
        setattr(module, linear, fused)
        setattr(module, activation, nn.Identity())
