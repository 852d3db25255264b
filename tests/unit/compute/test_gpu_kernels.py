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

from blip2_serve.compute import drawing
from blip2_serve.compute.base import Device
from blip2_serve.model import decoder
from support.device import DEVICE

NO_TRITON = "Triton is not installed: torch for GPUs brings it, and so do the tests on x86-64 Linux"
add_norm = pytest.importorskip("blip2_serve.compute.cuda.add_norm", reason=NO_TRITON)
decode_attention = pytest.importorskip(
    "blip2_serve.compute.cuda.decode_attention", reason=NO_TRITON
)
top_p_kernel = pytest.importorskip("blip2_serve.compute.cuda.top_p", reason=NO_TRITON)

pytestmark = pytest.mark.slow  # Triton's interpreter is
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


@pytest.mark.parametrize("top_p", [1e-9, 0.3, 0.9, 0.999])
def test_top_p_keeps_what_a_sort_keeps(top_p: float) -> None:
    """Scores of bfloat16 have many ties; some are infinite, or zero of either sign."""
    width = 2 * top_p_kernel.BLOCK - 5
    scores = (2 * randn(3, width)).bfloat16().float()
    scores[0, ::3] = -torch.inf
    scores[1] = torch.tensor([0.0, -0.0]).repeat(width)[:width]
    scores[2, 7] = 30  # all of the mass
    scores = scores.to(DEVICE)
    shares = (scores - scores.amax(1, keepdim=True)).exp()
    weights = (shares.double() * 2**40).long()
    part = torch.full((3, 1), top_p, dtype=torch.float64, device=DEVICE)
    expected = drawing.keep_top_p(weights.clone(), scores, part)
    assert torch.equal(top_p_kernel.keep_top_p(weights, scores, part), expected)


# Runs in its own process, because the kernels of this one may be defined for the interpreter.
COMPILE = """
import sys
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from blip2_serve.compute.cuda import (
    add_norm, decode_attention, fp8, linear, ragged_attention, top_p
)

number, capability = "*" + sys.argv[1], int(sys.argv[2])
overlap = {"overlap": capability >= 90}
block, _, stages = decode_attention.FOR_MANY
kernels = [
    (
        decode_attention._kernel,
        [number] * 4 + ["*i64", "i32", "*i64", "i32", "fp32"],
        {
            "heads": 32,
            "dim": 80,
            "padded_dim": 128,
            "block": block,
            "stages": stages,
        },
        1,
    ),
    (
        ragged_attention._kernel,
        [number] * 4 + ["*i64", "i32", "*i64", "i32", "fp32"],
        {
            "heads": 32,
            "dim": 80,
            "padded_dim": 128,
            "queries": ragged_attention.QUERIES,
            "block": ragged_attention.SHAPE[0],
            "stages": ragged_attention.SHAPE[2],
        },
        ragged_attention.SHAPE[1],
    ),
    (
        top_p._kernel,
        ["*i64", "*fp32", "*fp64", "i32"],
        {"block": top_p.BLOCK},
        top_p.WARPS,
    ),
    (
        add_norm._kernel,
        [number] * 6 + ["fp32"],
        {"width": 2560, "padded_width": 4096, **overlap},
        add_norm.warps(1),
    ),
]
for rows, shapes in linear.SHAPES.items():
    for _, shape in shapes:
        constants = {"columns": shape.columns, "depth": shape.depth, "relu": True, **overlap}
        constants |= {"padded_rows": rows, "vector": 4 if number == "*fp32" else 8}
        kernels.append((linear._kernel, [number] * 4 + ["i32"] * 3, constants, shape.warps))
if capability >= 89:
    quantized, row = ["*fp8e4nv", "*fp32"], {"width": 1408, "padded_width": 2048}
    types = [number, *quantized, *[number] * 4, "fp32"]
    kernels.append((fp8._add_norm_kernel, types, row, fp8.NORM_WARPS))
    for gelu in (False, True):
        constants = {**row, "gelu": gelu}
        kernels.append((fp8._quantize_kernel, [*quantized, number], constants, fp8.GELU_WARPS))
for kernel, types, constants, warps in kernels:
    names = kernel.arg_names[: len(types)]
    signature = dict(zip(names, types)) | dict.fromkeys(constants, "constexpr")
    # What a launch knows of torch's memory, and of sizes that are multiples of 16.
    aligned = {
        (place,): [["tt.divisibility", 16]]
        for place, name in enumerate(names)
        if types[place][0] == "*" or name in ("outputs", "inputs")
    }
    source = ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=aligned)
    options = {"num_warps": warps}
    compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
    assert compiled.asm["cubin"]
    if kernel is linear._kernel:
        ptx = compiled.asm["ptx"]
        loads = [line for line in ptx.splitlines() if "evict_first" in line and "ld.global" in line]
        assert loads and all("v4.b32" in line for line in loads), loads  # 16 bytes each
        loop = ptx[ptx.index("$L__BB") :]
        loop = loop[: loop.index("bra")]
        assert "ld.global" in loop and "bar.sync" not in loop, loop  # nothing is exchanged
"""


@pytest.mark.parametrize(
    ("dtype", "capability"),
    [
        ("bf16", 90),
        pytest.param("fp16", 80, marks=pytest.mark.long),
        pytest.param("bf16", 80, marks=pytest.mark.long),
        pytest.param("fp32", 80, marks=pytest.mark.long),
    ],
)
def test_the_kernels_compile(
    dtype: str, capability: int, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """For Ampere (A100), and for Hopper (H100), where kernels overlap."""
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    command = [sys.executable, "-c", COMPILE, dtype, str(capability)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
