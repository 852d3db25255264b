"""Kernels in Triton against torch: on a GPU if there is one, else by Triton's interpreter.

The interpreter lets more pass than the compiler does, which needs no GPU either.
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

NO_TRITON = "Triton is not here: it comes with torch for GPUs, and for the tests on x86-64 Linux"
add_norm = pytest.importorskip("blip2_serve.compute.cuda.add_norm", reason=NO_TRITON)
decode_attention = pytest.importorskip(
    "blip2_serve.compute.cuda.decode_attention", reason=NO_TRITON
)

ROWS = 300
UNUSED = 250  # rows from here on were never written

DTYPES = [
    pytest.param(torch.float32, 1e-5, id="float32"),
    pytest.param(torch.bfloat16, 2e-2, id="bfloat16"),
]


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def in_plain_torch(qkv: Tensor, kv: Tensor, slots: Tensor, positions: Tensor) -> Tensor:
    return Device(DEVICE).attend_decode(kv[None], slots, positions)(0, qkv)


@pytest.mark.parametrize(("dtype", "tolerance"), DTYPES)
@pytest.mark.parametrize("dim", [pytest.param(16, id="16"), pytest.param(20, id="no power of 2")])
def test_tokens_attend_to_the_slots_of_their_sequences(
    dim: int, dtype: torch.dtype, tolerance: float
) -> None:
    """Sequences of 1, 2, a block, and more than a block of tokens; and one of padding."""
    block, heads = decode_attention.FOR_FEW[0], 2
    starts = torch.tensor([0, 1, block, 2 * block + 3, 0])
    kv = randn(2, ROWS, heads, dim)
    kv[:, UNUSED:] = torch.nan
    # Some rows are several sequences': beams share a beginning.
    tables = torch.stack([torch.randperm(UNUSED - 1) + 1 for _ in starts])
    own = torch.tensor([UNUSED + n for n in range(4)] + [0])
    tables[torch.arange(5), starts] = own
    qkv = randn(5, 3, heads, dim, seed=1).to(DEVICE, dtype)
    kv, tables, starts = kv.to(DEVICE, dtype), tables.to(DEVICE), starts.to(DEVICE)
    expected_kv = kv.clone()
    expected = in_plain_torch(qkv.float(), expected_kv.float(), tables, starts)
    expected_kv[:, own] = qkv[:, 1:].transpose(0, 1)

    attended = decode_attention.attend(qkv, kv, tables, starts)

    assert attended.dtype == dtype
    torch.testing.assert_close(attended.float(), expected, atol=tolerance, rtol=tolerance)
    torch.testing.assert_close(kv, expected_kv, atol=0, rtol=0, equal_nan=True)


def test_tables_and_positions_may_be_parts_of_a_wider_tensor() -> None:
    inputs = (1 + torch.randperm(ROWS - 1)[:120]).view(3, 40).to(DEVICE)
    inputs[:, 1] = torch.tensor([4, 20, 37])
    qkv, kv = randn(3, 3, 2, 16).to(DEVICE), randn(2, ROWS, 2, 16, seed=1).to(DEVICE)
    tables, starts = inputs[:, 2:], inputs[:, 1]
    expected = in_plain_torch(qkv, kv.clone(), tables, starts)
    attended = decode_attention.attend(qkv, kv, tables, starts)
    torch.testing.assert_close(attended, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(("dtype", "tolerance"), DTYPES)
def test_a_sum_and_its_norm_are_those_of_torch(dtype: torch.dtype, tolerance: float) -> None:
    norm = nn.LayerNorm(20).to(DEVICE, dtype).requires_grad_(False)
    norm.weight.copy_(randn(20, seed=1))
    norm.bias.copy_(randn(20, seed=2))
    x, more = (randn(3, 20, seed=seed).to(DEVICE, dtype) * 5 + 3 for seed in (3, 4))
    kept = x.clone()

    summed, normed = add_norm.add_norm(x, more, norm)

    torch.testing.assert_close(x, kept, atol=0, rtol=0)
    torch.testing.assert_close(summed, decoder.add_norm(x, more, norm)[0], atol=0, rtol=tolerance)
    torch.testing.assert_close(normed, norm(summed), atol=tolerance, rtol=tolerance)


# In a process of its own: in this one, kernels may have been defined for the interpreter.
COMPILE = """
import sys
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from blip2_serve.compute.cuda import add_norm, decode_attention

number = "*" + sys.argv[1]
block, _, stages = decode_attention.FOR_MANY
for kernel, types, constants in (
    (
        decode_attention._kernel,
        [number] * 4 + ["*i64", "i32", "*i64", "i32", "fp32"],
        {"heads": 32, "dim": 80, "padded_dim": 128, "block": block, "stages": stages},
    ),
    (add_norm._kernel, [number] * 6 + ["fp32"], {"width": 2560, "padded_width": 4096}),
):
    names = kernel.arg_names[: len(types)]
    signature = dict(zip(names, types)) | dict.fromkeys(constants, "constexpr")
    source = ASTSource(fn=kernel, signature=signature, constexprs=constants)
    compiled = triton.compile(source, target=GPUTarget("cuda", 80, 32))
    assert compiled.asm["cubin"]
"""


@pytest.mark.parametrize("dtype", ["bf16", "fp16", "fp32"])
def test_the_kernels_compile_for_an_ampere_gpu(
    dtype: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    done = subprocess.run([sys.executable, "-c", COMPILE, dtype], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
