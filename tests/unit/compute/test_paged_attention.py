"""The compiled attention of single tokens against torch's own."""

from __future__ import annotations

import ctypes
from array import array
from random import Random

import pytest
import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from blip2_serve.compute.cpu.paged_attention import kernel, last_tokens

LAYERS, HEADS, ROWS = 2, 5, 300
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 1.6e-2, torch.float16: 2e-3}


def random_kv(dtype: torch.dtype, dim: int) -> Tensor:
    """Row 0 is nobody's, and NaN: whoever reads it shows."""
    kv = torch.randn(LAYERS, 2, ROWS, HEADS, dim).to(dtype)
    kv[:, :, 0] = torch.nan
    return kv


def random_tables(lengths: list[int]) -> list[array[int]]:
    """Rows in no order; no two sequences have one in common."""
    rows = Random(0).sample(range(1, ROWS), sum(lengths))
    return [array("q", (rows.pop() for _ in range(length))) for length in lengths]


def expected(kv: Tensor, layer: int, table: array[int], qkv: Tensor) -> Tensor:
    """By torch in float32, with the token's own keys and values in their row."""
    keys, values = kv[layer, :, list(table)].clone()
    keys[-1], values[-1] = qkv[1:]
    query, keys, values = (t.float().transpose(0, 1) for t in (qkv[:1], keys, values))
    return scaled_dot_product_attention(query, keys, values)[:, 0]


@pytest.mark.usefixtures("threads")
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize(
    "lengths",
    [
        pytest.param([1], id="a sequence of one token"),
        pytest.param([70], id="one sequence, whose heads are shared out"),
        pytest.param([3, 90, 1, 41, 17], id="sequences of many lengths"),
    ],
)
def test_it_is_attention(dtype: torch.dtype, lengths: list[int]) -> None:
    torch.manual_seed(len(lengths))
    kv, tables = random_kv(dtype, 24), random_tables(lengths)
    before = kv.clone()
    qkv = torch.randn(LAYERS, len(tables), 3, HEADS, 24).to(dtype)
    attend = last_tokens(tables, kv)
    for layer in range(LAYERS):
        attended = attend(layer, qkv[layer])
        for i, table in enumerate(tables):
            torch.testing.assert_close(
                attended[i].float(),
                expected(before, layer, table, qkv[layer, i]),
                atol=TOLERANCE[dtype],
                rtol=TOLERANCE[dtype],
            )
    for i, table in enumerate(tables):
        own = kv[:, :, table[-1]].transpose(0, 1)
        assert torch.equal(own, qkv[:, i, 1:].transpose(0, 1))
    others = [row for row in range(1, ROWS) if row not in {table[-1] for table in tables}]
    assert torch.equal(kv[:, :, others], before[:, :, others])


def test_a_sequence_has_the_same_result_in_any_company() -> None:
    torch.manual_seed(0)
    kv, tables = random_kv(torch.float32, 24), random_tables([50, 3, 8, 64, 20])
    qkv = torch.randn(len(tables), 3, HEADS, 24)
    together = last_tokens(tables, kv)(0, qkv).clone()
    for i, table in enumerate(tables):
        assert torch.equal(last_tokens([table], kv)(0, qkv[i : i + 1])[0], together[i])


def test_large_scores_do_not_overflow() -> None:
    torch.manual_seed(0)
    kv, (table,) = random_kv(torch.float32, 24), random_tables([30])
    qkv = 1000 * torch.randn(1, 3, HEADS, 24)
    attended = last_tokens([table], kv)(1, qkv)[0]
    torch.testing.assert_close(attended, expected(kv, 1, table, qkv[0]))


def test_bfloat16_is_rounded_as_torch_rounds() -> None:
    """Two tokens that count the same: the result is half their sum, often between two numbers."""
    torch.manual_seed(0)
    kv, table = random_kv(torch.bfloat16, 24), array("q", [7, 2])
    qkv = torch.randn(1, 3, HEADS, 24).bfloat16()
    qkv[:, 0] = 0  # looks at all alike
    half = (kv[0, 1, 7].float() + qkv[0, 2].float()) / 2
    assert (half != half.bfloat16().float()).any()
    assert torch.equal(last_tokens([table], kv)(0, qkv)[0], half.bfloat16())


def test_products_inside_torchs_own_attention_start_no_threads() -> None:
    """numba allows it when its threads start, and prompts would take twice as long."""
    openmp = ctypes.CDLL(None)
    if not hasattr(openmp, "omp_get_max_active_levels"):
        pytest.skip("torch computes without OpenMP here")
    kernel(torch.float32, 24)
    assert openmp.omp_get_max_active_levels() == 1
