"""The compiled attention of single tokens against torch's own."""

from __future__ import annotations

import ctypes
from array import array
from random import Random

import pytest
import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from blip2_serve.compute.cpu.paged_attention import attend_decode, kernel

LAYERS, HEADS, SLOTS = 2, 5, 300
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 1.6e-2, torch.float16: 2e-3}


def random_kv(dtype: torch.dtype, dim: int) -> Tensor:
    """Slot 0 belongs to no sequence and is NaN, so reading it shows."""
    kv = torch.randn(LAYERS, 2, SLOTS, HEADS, dim).to(dtype)
    kv[:, :, 0] = torch.nan
    return kv


def random_slots(lengths: list[int]) -> list[array[int]]:
    """Each sequence's own slots, in no order."""
    free = Random(0).sample(range(1, SLOTS), sum(lengths))
    return [array("q", (free.pop() for _ in range(length))) for length in lengths]


def expected(kv: Tensor, layer: int, slots: array[int], qkv: Tensor) -> Tensor:
    """By torch in float32, with the token's own keys and values in their slot."""
    keys, values = kv[layer, :, list(slots)].clone()
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
    kv, sequences = random_kv(dtype, 24), random_slots(lengths)
    before = kv.clone()
    qkv = torch.randn(LAYERS, len(sequences), 3, HEADS, 24).to(dtype)
    attend = attend_decode(sequences, kv)
    for layer in range(LAYERS):
        attended = attend(layer, qkv[layer])
        for i, slots in enumerate(sequences):
            torch.testing.assert_close(
                attended[i].float(),
                expected(before, layer, slots, qkv[layer, i]),
                atol=TOLERANCE[dtype],
                rtol=TOLERANCE[dtype],
            )
    for i, slots in enumerate(sequences):
        own = kv[:, :, slots[-1]].transpose(0, 1)
        assert torch.equal(own, qkv[:, i, 1:].transpose(0, 1))
    written = {slots[-1] for slots in sequences}
    others = [slot for slot in range(1, SLOTS) if slot not in written]
    assert torch.equal(kv[:, :, others], before[:, :, others])


def test_a_sequence_has_the_same_result_in_any_company() -> None:
    torch.manual_seed(0)
    kv, sequences = random_kv(torch.float32, 24), random_slots([50, 3, 8, 64, 20])
    qkv = torch.randn(len(sequences), 3, HEADS, 24)
    together = attend_decode(sequences, kv)(0, qkv).clone()
    for i, slots in enumerate(sequences):
        assert torch.equal(attend_decode([slots], kv)(0, qkv[i : i + 1])[0], together[i])


def test_large_scores_do_not_overflow() -> None:
    torch.manual_seed(0)
    kv, (slots,) = random_kv(torch.float32, 24), random_slots([30])
    qkv = 1000 * torch.randn(1, 3, HEADS, 24)
    attended = attend_decode([slots], kv)(1, qkv)[0]
    torch.testing.assert_close(attended, expected(kv, 1, slots, qkv[0]))


def test_bfloat16_is_rounded_as_torch_rounds() -> None:
    """Of two tokens with the same weight: half their sum often lies between two numbers."""
    torch.manual_seed(0)
    kv, slots = random_kv(torch.bfloat16, 24), array("q", [7, 2])
    qkv = torch.randn(1, 3, HEADS, 24).bfloat16()
    qkv[:, 0] = 0  # looks at both alike
    half = (kv[0, 1, 7].float() + qkv[0, 2].float()) / 2
    assert (half != half.bfloat16().float()).any()
    assert torch.equal(attend_decode([slots], kv)(0, qkv)[0], half.bfloat16())


def test_products_inside_torchs_own_attention_start_no_threads() -> None:
    """numba allows it when it starts its threads, and a prefill would take twice as long."""
    openmp = ctypes.CDLL(None)
    if not hasattr(openmp, "omp_get_max_active_levels"):
        pytest.skip("torch computes without OpenMP here")
    kernel(torch.float32, 24)
    assert openmp.omp_get_max_active_levels() == 1
