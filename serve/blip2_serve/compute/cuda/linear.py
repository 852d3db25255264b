"""Linear layers for few rows, written in Triton.

A decode step of few sequences takes as long as reading the weights. cuBLAS reads those of most
layers at three quarters of the bandwidth, or less (docs/lab/2026-11-gpu.md). These kernels have
enough loads on their way to reach nearly all of it, start loading before the kernel in front of
them has ended, and apply bias and ReLU to their sums. Every sum has one order, whatever the timing.

Weights stay where torch has them, [out_features, in_features]: a tied head stays tied.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor, nn
from torch.nn.functional import linear as torch_linear
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from blip2_serve.compute.cuda import overlap as overlapping
from blip2_serve.model.packing import MakeLinear


@dataclass(frozen=True)
class Shape:
    """How a program sums: element by element, for one row or a few."""

    columns: int  # output features per program
    depth: int  # input features at a time: 16 bytes for each thread, so that none are exchanged
    warps: int


# By the number of rows: shapes for layers of up to so many output features, as measured on an H200.
# Three rows and more are left to cuBLAS, which then reads as fast.
SHAPES: dict[int, tuple[tuple[float, Shape], ...]] = {
    1: ((4096, Shape(8, 2048, 8)), (8192, Shape(4, 1024, 4)), (math.inf, Shape(8, 1024, 4))),
    2: ((4096, Shape(8, 1024, 4)), (8192, Shape(4, 1024, 4)), (math.inf, Shape(8, 512, 2))),
}


class FewRowsLinear(nn.Module):
    """A linear layer, by these kernels for few rows, and ReLU behind it if asked."""

    def __init__(
        self, layer: nn.Linear, *, relu: bool = False, out_dtype: torch.dtype | None = None
    ) -> None:
        """Shares the weights of `layer`. With `out_dtype`, few rows come in that dtype."""
        super().__init__()
        self.weight, self.bias = layer.weight, layer.bias
        self._relu, self._out_dtype = relu, out_dtype

    def forward(self, x: Tensor) -> Tensor:
        """[rows, in_features] -> [rows, out_features]."""
        if shape := choose(len(x), len(self.weight)):
            return linear(x, self.weight, self.bias, shape, relu=self._relu, dtype=self._out_dtype)
        if self._relu and self.bias is not None:
            return torch._addmm_activation(self.bias, x, self.weight.T)
        y = torch_linear(x, self.weight, self.bias)
        return y.relu_() if self._relu else y


def for_few_rows(head: nn.Linear) -> MakeLinear:
    """How to make a decoder's layers. Few rows of its `head` are float32: logits, unrounded."""

    def make(layer: nn.Linear, activation: str) -> nn.Module | None:
        if activation not in ("none", "relu"):
            return None
        out_dtype = torch.float32 if layer is head else None
        return FewRowsLinear(layer, relu=activation == "relu", out_dtype=out_dtype)

    return make


def choose(rows: int, outputs: int) -> Shape | None:
    """How to compute so many rows of so many output features; None: not by this kernel."""
    shapes = SHAPES.get(rows, ())
    return next((shape for most, shape in shapes if outputs <= most), None)


def linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    shape: Shape,
    *,
    relu: bool = False,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """x weight^T + bias, and ReLU if asked; sums are computed in float32.

    Args:
        x: [rows, in_features], few rows.
        weight: [out_features, in_features], contiguous.
        bias: [out_features] or None.
        dtype: of the result; that of `x` if not given.

    Returns:
        [rows, out_features].
    """
    (rows, inputs), outputs = x.shape, len(weight)
    out = torch.empty((rows, outputs), dtype=dtype or x.dtype, device=x.device)
    _kernel[(triton.cdiv(outputs, shape.columns),)](
        out,
        x.contiguous(),
        weight,
        bias,
        rows,
        outputs,
        inputs,
        padded_rows=triton.next_power_of_2(rows),
        columns=shape.columns,
        depth=shape.depth,
        vector=16 // x.element_size(),
        relu=relu,
        num_warps=shape.warps,
        **overlapping.options(x.device),
    )
    return out


def _sums(  # type: ignore[no-untyped-def]  # Triton reads annotations
    out,
    x,
    weight,
    bias,
    rows,
    outputs,
    inputs,
    padded_rows: tl.constexpr,
    columns: tl.constexpr,
    depth: tl.constexpr,
    vector: tl.constexpr,
    relu: tl.constexpr,
    overlap: tl.constexpr,
):
    # All blocks have three dimensions, rows x columns x depth, and lie in the same threads: the
    # loop exchanges nothing between them.
    row = tl.arange(0, padded_rows)[:, None, None]
    column = (tl.program_id(0) * columns + tl.arange(0, columns))[None, :, None]
    step = tl.arange(0, depth)[None, None, :]
    row_x = x + row * inputs + step
    row_weight = weight + column.to(tl.int64) * inputs + step
    if overlap:
        gdc_launch_dependents()
    wanted = (column < outputs) & (step < inputs)
    weights = tl.load(row_weight, wanted, 0, eviction_policy="evict_first")
    if overlap:
        gdc_wait()
    total = tl.zeros([padded_rows, columns, depth // vector], tl.float32)
    for start in range(0, inputs, depth):
        wanted = (row < rows) & (start + step < inputs)
        values = tl.load(row_x + start, wanted, 0)
        # The next weights are on their way while these are used.
        wanted = (column < outputs) & (start + depth + step < inputs)
        following = tl.load(row_weight + (start + depth), wanted, 0, eviction_policy="evict_first")
        products = weights.to(tl.float32) * values.to(tl.float32)
        by_thread = tl.reshape(products, [padded_rows, columns, depth // vector, vector])
        total += tl.sum(by_thread, 3)
        weights = following
    result = tl.sum(total, 2)
    row = tl.arange(0, padded_rows)[:, None]
    column = (tl.program_id(0) * columns + tl.arange(0, columns))[None, :]
    if bias is not None:
        result += tl.load(bias + column, column < outputs, 0).to(tl.float32)
    if relu:
        result = tl.maximum(result, 0.0)
    tl.store(out + row * outputs + column, result, (row < rows) & (column < outputs))


# The number of rows is no reason to compile again.
_kernel = triton.jit(_sums, do_not_specialize=["rows"])
