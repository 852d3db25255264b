"""Activation functions, by transformers' names. Its own table takes seconds to import."""

from __future__ import annotations

from torch import Tensor, nn

from blip2_serve.errors import StartupError


class QuickGELU(nn.Module):
    """CLIP's approximation."""

    def forward(self, x: Tensor) -> Tensor:
        return x * (1.702 * x).sigmoid()


_ACTIVATIONS: dict[str, type[nn.Module]] = {
    "relu": nn.ReLU,
    "gelu": nn.GELU,
    "quick_gelu": QuickGELU,
    "silu": nn.SiLU,
}


def activation(name: str) -> nn.Module:
    """
    Raises:
        StartupError: no checkpoint was known to have this one.
    """
    if name not in _ACTIVATIONS:
        raise StartupError(
            f"the activation {name!r} is not supported; a model can have {', '.join(_ACTIVATIONS)}"
        )
    return _ACTIVATIONS[name]()
