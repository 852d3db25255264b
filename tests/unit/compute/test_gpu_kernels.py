"""Compares the Triton kernels with torch: on a GPU if there is one, else in Triton's interpreter.

The interpreter accepts more than the compiler does, so another test compiles them, which needs no
GPU.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from blip2_serve.compute.base import Device
from blip2_serve.model import decoder
from support.device import DEVICE

NO_TRITON = "Triton is not installed: torch for GPUs brings it, and so do the tests on x86-64 Linux"
add_norm = pytest.importorskip("blip2_serve.compute.cuda.add_norm", reason=NO_TRITON)
decode_attention = pytest.importorskip(
    "blip2_serve.compute.cuda.decode_attention", reason=NO_TRITON
)

SLOTS = 300
UNWRITTEN = 250  # the first of the slots that were never written

DTYPES = [
    pytest.param(torch.float32, 1e-5, id="float32"),
    pytest.param(torch.bfloat16, 2e-2, id="bfloat16"),
]


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def reference(qkv: Tensor, kv: Tensor, slots: Tensor, positions: Tensor) -> Tensor:
    return Device(DEVICE).attend_decode(kv[None], slots, positions)(0, qkv)


@pytest.mark.parametrize(("dtype", "tolerance"), DTYPES)
@pytest.mark.parametrize("dim", [16, 20])  # 20 is not a power of 2
def test_decode_attention_matches_plain_torch(
    dim: int, dtype: torch.dtype, tolerance: float
) -> None:
    """Sequences of 1 token, 2 tokens, a block and several blocks, and one row of padding."""
    block, heads = decode_attention.FOR_FEW[0], 2
    positions = torch.tensor([0, 1, block, 2 * block + 3, 0])
    kv = randn(2, SLOTS, heads, dim)
    kv[:, UNWRITTEN:] = torch.nan
    # Sequences share some slots, as beams with a common prefix do.
    slots = torch.stack([torch.randperm(UNWRITTEN - 1) + 1 for _ in positions])
    own_slots = torch.tensor([UNWRITTEN + n for n in range(4)] + [0])
    slots[torch.arange(5), positions] = own_slots
    qkv = randn(5, 3, heads, dim, seed=1).to(DEVICE, dtype)
    kv, slots, positions = kv.to(DEVICE, dtype), slots.to(DEVICE), positions.to(DEVICE)
    expected_kv = kv.clone()
    expected = reference(qkv.float(), expected_kv.float(), slots, positions)
    expected_kv[:, own_slots] = qkv[:, 1:].transpose(0, 1)

    attended = decode_attention.attend(qkv, kv, slots, positions)

    assert attended.dtype == dtype
    torch.testing.assert_close(attended.float(), expected, atol=tolerance, rtol=tolerance)
    torch.testing.assert_close(kv, expected_kv, atol=0, rtol=0, equal_nan=True)


def test_slots_and_positions_may_be_views_of_a_wider_tensor() -> None:
    inputs = (1 + torch.randperm(SLOTS - 1)[:120]).view(3, 40).to(DEVICE)
    inputs[:, 1] = torch.tensor([4, 20, 37])
    qkv, kv = randn(3, 3, 2, 16).to(DEVICE), randn(2, SLOTS, 2, 16, seed=1).to(DEVICE)
    slots, positions = inputs[:, 2:], inputs[:, 1]
    expected = reference(qkv, kv.clone(), slots, positions)
    attended = decode_attention.attend(qkv, kv, slots, positions)
    torch.testing.assert_close(attended, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(("dtype", "tolerance"), DTYPES)
def test_add_norm_matches_plain_torch(dtype: torch.dtype, tolerance: float) -> None:
    norm = nn.LayerNorm(20).to(DEVICE, dtype).requires_grad_(False)
    norm.weight.copy_(randn(20, seed=1))
    norm.bias.copy_(randn(20, seed=2))
    x, more = (randn(3, 20, seed=seed).to(DEVICE, dtype) * 5 + 3 for seed in (3, 4))
    x_before = x.clone()

    summed, normed = add_norm.add_norm(x, more, norm)

    torch.testing.assert_close(x, x_before, atol=0, rtol=0)
    torch.testing.assert_close(summed, decoder.add_norm(x, more, norm)[0], atol=0, rtol=tolerance)
    torch.testing.assert_close(normed, norm(summed), atol=tolerance, rtol=tolerance)


# Runs in its own process, because the kernels of this one may be defined for the interpreter.
COMPILE = """
import sys
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from blip2_serve.compute.cuda import add_norm, decode_attention, fp8, image_attention

number, capability = "*" + sys.argv[1], int(sys.argv[2])
block, _, stages = decode_attention.FOR_MANY
row = {"width": 1408, "padded_width": 2048}
kernels = [
    (
        decode_attention._kernel,
        [number] * 4 + ["*i64", "i32", "*i64", "i32", "fp32"],
        {"heads": 32, "dim": 80, "padded_dim": 128, "block": block, "stages": stages},
    ),
    (add_norm._kernel, [number] * 6 + ["fp32"], {"width": 2560, "padded_width": 4096}),
]
if number != "*fp32":
    for size in (image_attention.FOR_FEW, image_attention.FOR_MANY):
        head = {"heads": 16, "dim": 88, "first": 64, "rest": 32}
        sizes = {"queries": size.queries, "keys": size.keys, "stages": size.stages}
        kernels.append((image_attention._kernel, [number] * 2 + ["i32", "fp32"], head | sizes))
if capability >= 89:
    quantized = ["*fp8e4nv", "*fp32"]
    types = [number, *quantized, *[number] * 4, "fp32"]
    kernels.append((fp8._add_norm_kernel, types, row))
    for gelu in (False, True):
        kernels.append((fp8._quantize_kernel, [*quantized, number], row | {"gelu": gelu}))
for kernel, types, constants in kernels:
    names = kernel.arg_names[: len(types)]
    signature = dict(zip(names, types)) | dict.fromkeys(constants, "constexpr")
    source = ASTSource(fn=kernel, signature=signature, constexprs=constants)
    compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32))
    assert compiled.asm["cubin"]
"""


@pytest.mark.parametrize(
    ("dtype", "capability"), [("bf16", "80"), ("fp16", "80"), ("fp32", "80"), ("bf16", "90")]
)
def test_the_kernels_compile_for_gpus(
    dtype: str, capability: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    command = [sys.executable, "-c", COMPILE, dtype, capability]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
