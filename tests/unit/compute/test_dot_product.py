"""The compiled bfloat16 product against float64's."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from blip2_serve.compute.cpu import dot_product

pytestmark = pytest.mark.skipif(
    not dot_product.available(), reason="this CPU lacks AVX512's products of bfloat16, or has AMX"
)

OUTPUTS, INPUTS = 3 * dot_product.BLOCK, 70  # blocks that two threads do not share evenly


def random_layer(outputs: int = OUTPUTS, inputs: int = INPUTS) -> tuple[Tensor, Tensor]:
    torch.manual_seed(0)
    return torch.randn(outputs, inputs).bfloat16(), torch.randn(outputs)


def check(rows: int, outputs: int = OUTPUTS, inputs: int = INPUTS, *, relu: bool = False) -> None:
    weight, bias = random_layer(outputs, inputs)
    x = torch.randn(rows, inputs).bfloat16()
    expected = x.double() @ weight.double().T + bias.double()
    expected = expected.relu() if relu else expected
    result = dot_product.linear(x, dot_product.packed(weight), bias, relu=relu)

    assert result.dtype == torch.bfloat16
    assert result.shape == expected.shape
    # Rounded once, to 8 bits; the float32 sum before that is off by far less.
    size = x.double().abs() @ weight.double().abs().T + 1
    assert ((result.double() - expected).abs() <= 2**-8 * expected.abs() + 1e-5 * size).all()


@pytest.mark.parametrize("relu", [False, True], ids=["plain", "with a relu"])
@pytest.mark.parametrize("rows", [*range(1, 2 * dot_product.TILE_ROWS + 2), 45, 300])
def test_it_is_the_product(rows: int, relu: bool) -> None:
    check(rows, relu=relu)


@pytest.mark.parametrize("rows", [1, dot_product.TILE_ROWS + 1])
@pytest.mark.parametrize("outputs", [dot_product.BLOCK, 5 * dot_product.BLOCK])
@pytest.mark.parametrize("inputs", [2, 34, 802])
def test_it_takes_every_shape_that_fits(rows: int, outputs: int, inputs: int) -> None:
    check(rows, outputs, inputs)


@pytest.mark.usefixtures("threads")
def test_a_row_gives_the_same_bits_in_any_company() -> None:
    weight, bias = random_layer()
    packed = dot_product.packed(weight)
    x = torch.randn(45, INPUTS).bfloat16()
    together = dot_product.linear(x, packed, bias)
    for row in range(len(x)):
        alone = dot_product.linear(x[row : row + 1], packed, bias)
        assert torch.equal(alone[0], together[row])


@pytest.mark.parametrize("relu", [False, True], ids=["plain", "with a relu"])
def test_nan_stays_nan(relu: bool) -> None:
    weight, bias = random_layer()
    x = torch.randn(3, INPUTS).bfloat16()
    x[1, 5] = torch.nan
    result = dot_product.linear(x, dot_product.packed(weight), bias, relu=relu)

    assert result[1].isnan().all()
    assert result[::2].isfinite().all()


def test_rows_that_are_not_contiguous_are_read_as_they_lie() -> None:
    weight, bias = random_layer()
    packed = dot_product.packed(weight)
    x = torch.randn(INPUTS, 5).bfloat16().T

    assert torch.equal(
        dot_product.linear(x, packed, bias), dot_product.linear(x.contiguous(), packed, bias)
    )


def test_no_rows_give_none() -> None:
    weight, bias = random_layer()
    x = torch.empty(0, INPUTS, dtype=torch.bfloat16)
    assert dot_product.linear(x, dot_product.packed(weight), bias).shape == (0, OUTPUTS)


@pytest.mark.parametrize(
    ("features", "available"),
    [
        pytest.param({}, False, id="neither instruction"),
        pytest.param({"avx512bf16": True}, True, id="products of pairs"),
        pytest.param({"avx512bf16": True, "amx-bf16": True}, False, id="whole tiles too"),
    ],
)
def test_it_is_for_cpus_without_amx(
    monkeypatch: pytest.MonkeyPatch, features: dict[str, bool], available: bool
) -> None:
    binding = dot_product.llvmlite.binding
    monkeypatch.setattr(binding, "get_host_cpu_features", lambda: features)
    assert dot_product.available() is available


@pytest.mark.parametrize(
    ("shape", "fits"), [((64, 70), True), ((70, 64), False), ((64, 71), False)]
)
def test_it_takes_whole_blocks_of_outputs_and_pairs_of_inputs(
    shape: tuple[int, int], fits: bool
) -> None:
    assert dot_product.fits(torch.empty(shape)) is fits
