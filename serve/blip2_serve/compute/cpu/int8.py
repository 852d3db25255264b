"""Linear layers with int8 weights, for x86 CPUs.

A decode step reads every weight once, so at few rows half the bytes of bfloat16 are half the time.
Weights are rounded to 8 bits with one scale for each output channel; activations keep 14 bits or
more, so in effect only the weights are quantised. Products are those of 8-bit integers: each row of
activations becomes two rows of digits, high and low, that share one pass over the weights. Sums of
integers are exact, and each row has a scale of its own, so a row's result is the same to the last
bit whatever rows it is computed with.

The product is that of `kernels/int8_product.py`; on CPUs without its instruction, FBGEMM's.

This module knows which of OPT's layers are linear, and nothing of attention or of who asks.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from blip2_serve.errors import StartupError
from blip2_serve.model.decoder import OptDecoder

ENGINE = "fbgemm"

# torch 2.13 deprecates tensors of dtype qint8, but has no other way to FBGEMM's packing.
warnings.filterwarnings("ignore", "torch.quantize_per_tensor", UserWarning)
KERNEL_DTYPES = (torch.float32, torch.bfloat16)

# A digit lies between -63 and 63, and is stored with 64 added. With 8 bits of activations, CPUs
# without VNNI would overflow the 16-bit sums of two products; 127 * 127 * 2 fits.
_LARGEST, _ZERO = 63, 64
_BASE = 2 * _LARGEST  # what is left of a high digit lies between -0.5 and 0.5
_UNITS = torch.tensor([_LARGEST, _LARGEST * _BASE], dtype=torch.float32).view(2, 1, 1)


class KernelLinear(nn.Module):
    """An `nn.Linear` with its weight rounded to int8, and one of ACTIVATIONS behind it.

    Activations may be float32 or bfloat16.
    """

    ACTIVATIONS = ("none", "relu")

    def __init__(self, linear: nn.Linear, activation: str = "none") -> None:
        # Here, so that what runs on a GPU needs no numba.
        from blip2_serve.compute.cpu import int8_product

        super().__init__()
        self._linear = int8_product.linear
        self._weight = int8_product.packed(*quantized(linear.weight.detach()))
        zeros = torch.zeros(linear.out_features)
        self._bias = zeros if linear.bias is None else linear.bias.detach().float()
        self._relu = activation == "relu"
        int8_product.kernel(linear.weight.dtype)  # or the first request would wait for it

    def forward(self, x: Tensor) -> Tensor:
        """[rows, in_features] -> [rows, out_features]."""
        return self._linear(x, self._weight, self._bias, relu=self._relu)


class FbgemmLinear(nn.Module):
    """The same by FBGEMM, for float32 activations."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        weight, scales = quantized(linear.weight.detach())
        self._weight = _packed(weight, scales / _LARGEST)
        self._bias = None if linear.bias is None else linear.bias.detach().float()

    def forward(self, x: Tensor) -> Tensor:
        """[rows, in_features] -> [rows, out_features].

        A row of zeros needs no case of its own: its digits are whatever NaN becomes as an integer,
        and are multiplied by zero.
        """
        largest = torch.linalg.vector_norm(x, torch.inf, 1, keepdim=True)
        digits = x * (_UNITS / largest)  # [2, rows, in_features]
        high, low = digits.unbind()
        low.sub_(high.round_(), alpha=_BASE)
        high, low = _multiply(digits.flatten(0, 1), self._weight).chunk(2)
        y = torch.add(high, low, alpha=1 / _BASE)
        return y.mul_(largest) if self._bias is None else torch.addcmul(self._bias, y, largest)


def quantized(weight: Tensor) -> tuple[Tensor, Tensor]:
    """[out, in] -> int8 [out, in] between -127 and 127, and the float32 scale [out] of each row."""
    weight = weight.float()
    scales = weight.abs().amax(1).clamp_min(torch.finfo(torch.float32).tiny) / 127
    return (weight / scales[:, None]).round().to(torch.int8), scales


def quantize_decoder(decoder: OptDecoder) -> None:
    """Replaces the decoder's linear layers; each plain weight is freed before the next.

    With FBGEMM, all else becomes float32, embeddings and therefore keys and values included: at
    one token a step, changing dtypes back and forth takes a third of what int8 gains. A tied head
    is copied. The decoder must be where `check_int8` allows it.
    """
    if _suits_kernel(decoder):
        decoder.replace_linears(_kernel_linear)
    else:
        decoder.replace_linears(_fbgemm_linear)
        decoder.float()


def check_int8(device: torch.device) -> None:
    """Raises StartupError unless int8 can be computed there."""
    if device.type != "cpu":
        raise StartupError(
            "--quantize int8 is for CPUs only: leave it out, or start with --device cpu"
        )
    if ENGINE not in torch.backends.quantized.supported_engines:
        raise StartupError(
            "--quantize int8 needs a torch with FBGEMM, that is, an x86 CPU: leave it out"
        )


def _suits_kernel(decoder: OptDecoder) -> bool:
    from blip2_serve.compute.cpu import int8_product

    return int8_product.available() and all(
        module.weight.dtype in KERNEL_DTYPES and int8_product.fits(module.weight)
        for module in decoder.modules()
        if isinstance(module, nn.Linear)
    )


def _kernel_linear(layer: nn.Linear, activation: str) -> nn.Module | None:
    return KernelLinear(layer, activation) if activation in KernelLinear.ACTIVATIONS else None


def _fbgemm_linear(layer: nn.Linear, activation: str) -> nn.Module | None:
    return FbgemmLinear(layer) if activation == "none" else None


def _packed(weight: Tensor, scales: Tensor) -> torch.ScriptObject:
    """int8 [out, in] and float32 [out] as FBGEMM wants them."""
    zeros = torch.zeros(len(scales), dtype=torch.int64)
    with _engine():
        tensor = torch._make_per_channel_quantized_tensor(weight, scales.double(), zeros, 0)
        packed: torch.ScriptObject = torch.ops.quantized.linear_prepack(tensor, None)
    return packed


@contextmanager
def _engine() -> Iterator[None]:
    """FBGEMM, for the block: torch packs for the engine that is set, which may be oneDNN's."""
    backends = torch.backends.quantized
    before, backends.engine = backends.engine, ENGINE
    try:
        yield
    finally:
        backends.engine = before


def _multiply(digits: Tensor, weight: torch.ScriptObject) -> Tensor:
    """Rounds the digits, and multiplies with the weight and its scales -> float32."""
    multiply = torch.ops.quantized.linear_with_input_q_dq_qweight_dq_output_fp32.default
    products: Tensor = multiply(digits, 1.0, _ZERO, weight)
    return products
