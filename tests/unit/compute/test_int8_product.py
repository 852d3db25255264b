"""The compiled product with int8 weights against float64's."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from blip2_serve.compute.cpu import int8_product
from blip2_serve.compute.cpu.int8_product import Weight

pytestmark = pytest.mark.skipif(
    not int8_product.available(), reason="this CPU lacks AVX512's products of bytes"
)

OUTPUTS, INPUTS = 3 * int8_product.BLOCK, 80  # blocks that two threads do not share evenly
# And how far off rounding a result to one may be.
DTYPES = {torch.float32: 0, torch.bfloat16: 2**-8, torch.float16: 2**-11}


def random_layer(outputs: int = OUTPUTS, inputs: int = INPUTS) -> tuple[Tensor, Tensor, Tensor]:
    """int8 weights with their extremes, scales and biases."""
    torch.manual_seed(0)
    weight = torch.randint(-127, 128, (outputs, inputs), dtype=torch.int8)
    extremes = torch.tensor([-127, 127, 0, -1], dtype=torch.int8)[:inputs]
    weight[0, : len(extremes)] = extremes
    return weight, torch.rand(outputs) + 0.01, torch.randn(outputs)


def packed() -> Weight:
    return int8_product.packed(*random_layer())


def check(x: Tensor, outputs: int = OUTPUTS, *, relu: bool = False) -> None:
    """Against the exact product: an activation may be off by half a step of its row's."""
    weight, scales, bias = random_layer(outputs, x.shape[1])
    exact = weight.double() * scales.double()[:, None]
    expected = x.double() @ exact.T + bias.double()
    expected = expected.relu() if relu else expected
    result = int8_product.linear(x, int8_product.packed(weight, scales, bias), relu=relu)

    step = x.double().abs().amax(1, keepdim=True) / 32767
    off = 0.51 * step * exact.abs().sum(1)
    size = x.double().abs() @ exact.abs().T + 1
    assert result.dtype == x.dtype
    assert result.shape == expected.shape
    assert (
        (result.double() - expected).abs() <= off + DTYPES[x.dtype] * expected.abs() + 1e-6 * size
    ).all()


@pytest.mark.parametrize("relu", [False, True], ids=["plain", "with a relu"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("rows", [*range(1, 2 * int8_product.TILE_ROWS + 2), 45, 300])
def test_it_is_the_product(rows: int, dtype: torch.dtype, relu: bool) -> None:
    check(torch.randn(rows, INPUTS).to(dtype), relu=relu)


@pytest.mark.parametrize("rows", [1, int8_product.TILE_ROWS + 1])
@pytest.mark.parametrize(
    ("outputs", "inputs"),
    [
        pytest.param(1, 1, id="the smallest"),
        pytest.param(32, 16, id="the smallest that fills its tile"),
        pytest.param(70, 80, id="a broken tile of outputs"),
        pytest.param(96, 17, id="a broken vector of inputs"),
        pytest.param(70, 200, id="both"),
    ],
)
def test_it_takes_any_shape(rows: int, outputs: int, inputs: int) -> None:
    check(torch.randn(rows, inputs), outputs)


@pytest.mark.parametrize("sign", [1, -1])
def test_the_largest_sums_do_not_overflow(sign: int) -> None:
    inputs = 16384  # more than any OPT has
    weight = torch.full((OUTPUTS, inputs), 127 * sign, dtype=torch.int8)
    result = int8_product.linear(
        torch.ones(1, inputs),
        int8_product.packed(weight, torch.ones(OUTPUTS), torch.zeros(OUTPUTS)),
    )
    assert torch.allclose(result, torch.tensor(127.0 * sign * inputs), rtol=1e-4)


def test_an_outlier_leaves_the_others_what_is_left_of_16_bits() -> None:
    x = torch.randn(4, INPUTS)
    x[:, 11] = 100
    check(x)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.usefixtures("threads")
def test_a_row_gives_the_same_bits_in_any_company(dtype: torch.dtype) -> None:
    weight = packed()
    x = torch.randn(45, INPUTS)
    x[7] *= 1e4 if dtype == torch.float16 else 1e6
    x[8] = 0
    x = x.to(dtype)
    together = int8_product.linear(x, weight)
    more = 100 * torch.randn(300, INPUTS).to(dtype)
    among_many = int8_product.linear(torch.cat([x, more]), weight)
    assert torch.equal(among_many[: len(x)], together)
    for row in range(len(x)):
        alone = int8_product.linear(x[row : row + 1], weight)
        assert torch.equal(alone[0], together[row])


@pytest.mark.parametrize("size", [0.0, 1e-40], ids=["zeros", "too small to divide by"])
def test_a_row_of_next_to_nothing_gives_the_bias(size: float) -> None:
    weight, scales, bias = random_layer()
    x = torch.randn(3, INPUTS)
    x[1] = size
    result = int8_product.linear(x, int8_product.packed(weight, scales, bias))
    assert torch.equal(result[1], bias)


@pytest.mark.parametrize("relu", [False, True], ids=["plain", "with a relu"])
@pytest.mark.parametrize("number", [torch.nan, torch.inf, -torch.inf])
def test_a_row_that_is_not_finite_gives_nan(number: float, relu: bool) -> None:
    weight = packed()
    x = torch.randn(3, INPUTS)
    x[1, 5] = number
    result = int8_product.linear(x, weight, relu=relu)

    assert result[1].isnan().all()
    assert result[::2].isfinite().all()


def test_rows_that_are_not_contiguous_are_read_as_they_lie() -> None:
    weight = packed()
    x = torch.randn(INPUTS, 5).T

    assert torch.equal(int8_product.linear(x, weight), int8_product.linear(x.contiguous(), weight))


def test_no_rows_give_none() -> None:
    weight = packed()
    assert int8_product.linear(torch.empty(0, INPUTS), weight).shape == (0, OUTPUTS)


@pytest.mark.parametrize("available", [True, False])
def test_it_is_for_cpus_with_the_instruction(
    monkeypatch: pytest.MonkeyPatch, available: bool
) -> None:
    binding = int8_product.llvmlite.binding
    features = {"avx512vnni": available, "avx512bf16": not available}
    monkeypatch.setattr(binding, "get_host_cpu_features", lambda: features)
    assert int8_product.available() is available
