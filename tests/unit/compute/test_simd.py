"""What each vector instruction computes, lane by lane."""

from __future__ import annotations

from collections.abc import Callable

import numba
import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from blip2_serve.compute.cpu import dot_product, int8_product, simd
from blip2_serve.compute.cpu.formats import aligned, bits, format_of

Array = NDArray[np.generic]

store_f32 = format_of(torch.float32).store


def run(kernel: Callable[..., None], *arrays: Array) -> NDArray[np.float32]:
    """Calls it with the arrays' addresses and that of 16 results."""
    out = np.empty(simd.LANES, np.float32)
    numba.njit(kernel)(*(array.ctypes.data for array in arrays), out.ctypes.data)
    return out


def floats(*first: float) -> NDArray[np.float32]:
    """16 different numbers that begin with these."""
    numbers = np.arange(simd.LANES, dtype=np.float32) / 3
    numbers[: len(first)] = first
    return numbers


@pytest.mark.skipif(
    not dot_product.available(), reason="this CPU lacks AVX512's bfloat16, or has AMX"
)
def test_dot_bf16_adds_the_products_of_pairs() -> None:
    def kernel(a: int, b: int, c: int, out: int) -> None:
        first = simd.dot_bf16(simd.load_f32(c), simd.load_bf16(a), simd.load_bf16(b))
        store_f32(simd.dot_bf16(first, simd.broadcast_pair(a + 4), simd.load_bf16(b)), out)

    a, b = (torch.randint(-8, 8, (simd.LANES, 2)).bfloat16() for _ in range(2))
    start = floats()
    expected = start + ((a + a[1]).float() * b.float()).sum(1).numpy()
    np.testing.assert_allclose(run(kernel, bits(a), bits(b), start), expected, rtol=1e-6)


@pytest.mark.skipif(not int8_product.available(), reason="this CPU lacks AVX512-VNNI")
def test_dot_u8i8_adds_the_products_of_fours_with_and_without_signs() -> None:
    def kernel(a: int, b: int, c: int, out: int) -> None:
        first = simd.dot_u8i8(simd.load_i32(c), simd.load_i8(a), simd.load_i8(b))
        total = simd.dot_u8i8(first, simd.broadcast_four(a + 4), simd.load_i8(b))
        store_f32(simd.i32_to_f32(total), out)

    random = np.random.default_rng(0)
    a = random.integers(0, 256, (simd.LANES, 4), np.uint8)
    b = random.integers(-128, 128, (simd.LANES, 4), np.int8)
    a[0], b[0] = 255, -128
    start = np.arange(simd.LANES, dtype=np.int32)
    products = (a.astype(np.int32) + a[1].astype(np.int32)) * b
    np.testing.assert_array_equal(run(kernel, a, b, start), start + products.sum(1))


def test_at_least_is_the_larger_one_and_keeps_nan() -> None:
    def kernel(a: int, out: int) -> None:
        store_f32(simd.at_least(simd.load_f32(a), simd.broadcast_f32(1)), out)

    a = floats(np.nan, -np.inf, np.inf, -0.5)
    np.testing.assert_array_equal(run(kernel, a), np.where(a < 1, 1, a))


def test_fma_rounds_once() -> None:
    def kernel(a: int, b: int, out: int) -> None:
        square = simd.load_f32(a)
        store_f32(simd.fma_f32(square, square, simd.load_f32(b)), out)

    a = floats(1 + 2**-12)
    b = -(a * a)
    exact = a.astype(float) ** 2 + b
    assert exact[0] != 0
    np.testing.assert_array_equal(run(kernel, a, b), exact.astype(np.float32))


def test_numbers_become_the_nearest_integers_and_bytes() -> None:
    def nearest(a: int, out: int) -> None:
        store_f32(simd.i32_to_f32(simd.nearest_i32(simd.load_f32(a))), out)

    def in_bytes(a: int, out: int) -> None:
        integers = simd.load_i32(a)
        simd.store_low_bytes(integers, out)
        simd.store_low_bytes(simd.second_byte(integers), out + 16)

    a = floats(0.5, 1.5, -0.5, -2.5, 65535, -32767.4)
    np.testing.assert_array_equal(run(nearest, a), np.rint(a))
    integers = np.arange(65535, 0, -4000, np.int32)[: simd.LANES]
    out = run(in_bytes, integers).view(np.uint8)
    np.testing.assert_array_equal(out[:16], integers % 256)
    np.testing.assert_array_equal(out[16:32], integers // 256)


def test_registers_begin_with_zeros_and_hold_what_is_put() -> None:
    zeros, get, put = simd.registers(3, simd.F32x16)

    def kernel(a: int, out: int) -> None:
        array = zeros()
        for i in range(1, 3):
            put(array, i, simd.add_f32(get(array, i - 1), simd.load_f32(a)))
        store_f32(simd.mul_f32(get(array, 2), simd.broadcast_f32_at(a)), out)

    a = floats(5)
    np.testing.assert_array_equal(run(kernel, a), 2 * a * 5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_a_format_reads_and_rounds_as_torch_does(dtype: torch.dtype) -> None:
    memory = format_of(dtype)
    widen, narrow, load, store = memory.widen, memory.narrow, memory.load, memory.store

    def vectors(a: int, halved: int, out: int) -> None:
        numbers = load(a)
        store_f32(numbers, out)
        store(simd.mul_f32(numbers, simd.broadcast_f32(0.3)), halved)

    def scalars(a: NDArray[np.generic], result: NDArray[np.generic]) -> None:
        for i in range(len(a)):
            result[i] = narrow(widen(a[i]) * np.float32(0.3))

    a = torch.randn(simd.LANES).to(dtype)
    result = torch.empty_like(a)
    np.testing.assert_array_equal(run(vectors, bits(a), bits(result)), a.float().numpy())
    assert torch.equal(result, (a.float() * 0.3).to(dtype))
    result.zero_()
    numba.njit(scalars)(bits(a), bits(result))
    assert torch.equal(result, (a.float() * 0.3).to(dtype))


def test_aligned_memory_begins_with_a_cache_line() -> None:
    tensor = aligned((3, 5, 7), torch.bfloat16)
    assert tensor.shape == (3, 5, 7)
    assert tensor.dtype == torch.bfloat16
    assert tensor.is_contiguous()
    assert tensor.data_ptr() % simd.BYTES == 0
