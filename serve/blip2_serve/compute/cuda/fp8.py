"""Products of the ViT in 8-bit floating point (e4m3), twice as fast as bfloat16 from Ada GPUs on.

Weights have a scale for each output, and activations one for each row, computed by the kernel that
makes them: a norm, GELU, or, behind attention, a kernel of its own.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor, nn

from blip2_serve.compute.cuda.add_norm import sum_and_norm
from blip2_serve.compute.cuda.vision import Products
from blip2_serve.errors import StartupError

FP8 = torch.float8_e4m3fn
STEP = 16  # torch multiplies only widths that are multiples of it
LARGEST: tl.constexpr = tl.constexpr(448.0)  # of e4m3
SMALLEST: tl.constexpr = tl.constexpr(1e-12)  # a row of zeros must not divide by zero
NORM_WARPS, GELU_WARPS = 4, 8


class Quantized(NamedTuple):
    """Rows, or a linear layer's weight with one row for each output."""

    values: Tensor  # float8 [rows, width]
    scales: Tensor  # float32 [rows, 1]


class Fp8Linear(NamedTuple):
    weight: Quantized
    bias: Tensor | None


class Fp8Products(Products):
    """Products come in bfloat16, whatever the model's dtype is."""

    def weights(self, layer: nn.Linear) -> Fp8Linear:
        if any(width % STEP for width in layer.weight.shape):
            raise StartupError(
                "encoder.quantize: fp8 needs an image encoder whose widths are multiples of "
                f"{STEP}, and this checkpoint's are {layer.in_features} and {layer.out_features}: "
                "leave it out"
            )
        weight = layer.weight.float()
        scales = weight.abs().amax(1, keepdim=True).clamp_min(1e-12) / 448
        values = Quantized((weight / scales).to(FP8), scales)
        return Fp8Linear(values, None if layer.bias is None else layer.bias.bfloat16())

    def add_norm(self, x: Tensor, more: Tensor, norm: nn.LayerNorm) -> tuple[Tensor, Quantized]:
        total, rows = torch.empty_like(x), empty(x)
        width = x.shape[1]
        _add_norm_kernel[(len(x),)](
            total,
            *rows,
            x,
            more,
            norm.weight,
            norm.bias,
            norm.eps,
            width=width,
            padded_width=triton.next_power_of_2(width),
            num_warps=NORM_WARPS,
        )
        return total, rows

    def product(self, rows: Tensor | Quantized, layer: Fp8Linear) -> Tensor:
        if isinstance(rows, Tensor):
            rows = quantize(rows)
        return torch._scaled_mm(
            rows.values,
            layer.weight.values.T,
            scale_a=rows.scales,
            scale_b=layer.weight.scales.T,
            bias=layer.bias,
            out_dtype=torch.bfloat16,
            use_fast_accum=True,
        )

    def mlp(self, rows: Tensor | Quantized, fc1: Fp8Linear, fc2: Fp8Linear) -> Tensor:
        return self.product(quantize(self.product(rows, fc1), gelu=True), fc2)


def empty(x: Tensor) -> Quantized:
    """Room for x, quantized."""
    return Quantized(torch.empty_like(x, dtype=FP8), x.new_empty((len(x), 1), dtype=torch.float32))


def quantize(x: Tensor, gelu: bool = False) -> Quantized:
    """Scales each row of x, or of GELU(x), so that its largest value is e4m3's largest."""
    rows, width = empty(x), x.shape[1]
    _quantize_kernel[(len(x),)](
        *rows,
        x,
        width=width,
        padded_width=triton.next_power_of_2(width),
        gelu=gelu,
        num_warps=GELU_WARPS if gelu else NORM_WARPS,
    )
    return rows


def _store_quantized(  # type: ignore[no-untyped-def]  # Triton reads annotations
    values, scales, x, width: tl.constexpr, padded_width: tl.constexpr
):
    """Quantizes x, this program's row in float32, padded with zeros."""
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, padded_width)
    scale = tl.maximum(tl.max(tl.abs(x)), SMALLEST) / LARGEST
    tl.store(scales + row, scale)
    # Rounding must not carry the largest value beyond e4m3's, which has no infinity.
    scaled = tl.clamp(x / scale, -LARGEST, LARGEST)
    tl.store(values + row * width + columns, scaled.to(values.dtype.element_ty), columns < width)


_store = triton.jit(_store_quantized)


def _add_norm_quantized(  # type: ignore[no-untyped-def]
    total,
    values,
    scales,
    x,
    more,
    weight,
    bias,
    eps,
    width: tl.constexpr,
    padded_width: tl.constexpr,
):
    normed = sum_and_norm(total, x, more, weight, bias, eps, width, padded_width)
    _store(values, scales, normed, width, padded_width)


_add_norm_kernel = triton.jit(_add_norm_quantized)


def _quantize(  # type: ignore[no-untyped-def]
    values, scales, x, width: tl.constexpr, padded_width: tl.constexpr, gelu: tl.constexpr
):
    columns = tl.arange(0, padded_width)
    places = tl.program_id(0).to(tl.int64) * width + columns
    read = tl.load(x + places, columns < width, 0).to(tl.float32)
    if gelu:
        read = 0.5 * read * (1 + tl.erf(read * 0.7071067811865476))
    _store(values, scales, read, width, padded_width)


_quantize_kernel = triton.jit(_quantize)
