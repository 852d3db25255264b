"""Compares the image encoder's forward for GPUs with transformers' own.

As in test_gpu_kernels.py, Triton's interpreter takes the place of a GPU where there is none.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cosine_similarity, gelu, linear

from blip2_serve import preflight
from blip2_serve.compute.devices import check_quantize
from blip2_serve.config import AppConfig
from blip2_serve.errors import StartupError
from blip2_serve.model.decoder import add_norm
from blip2_serve.model.vision import ImageEncoder
from blip2_serve.stages.encoder import Encoder
from support.checkpoints import Recipe, load_encoder, write_checkpoint
from support.device import DEVICE
from support.interpreter import correct
from support.replicas import replica

NO_TRITON = "Triton is not installed: torch for GPUs brings it, and so do the tests on x86-64 Linux"
fp8 = pytest.importorskip("blip2_serve.compute.cuda.fp8", reason=NO_TRITON)
vision = pytest.importorskip("blip2_serve.compute.cuda.vision", reason=NO_TRITON)
device = pytest.importorskip("blip2_serve.compute.cuda.device", reason=NO_TRITON)

pytestmark = pytest.mark.slow  # Triton's interpreter is


@pytest.fixture(autouse=True)
def numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    correct(monkeypatch)


RECIPES = [
    pytest.param({"qformer": {"num_hidden_layers": 4}}, id="every other layer looks at the image"),
    pytest.param({"qformer": {"cross_attention_frequency": 1}}, id="every layer looks"),
    pytest.param({"vision": {"qkv_bias": False}}, id="no biases of queries and values"),
    pytest.param(
        {"vision": {"layer_norm_eps": 0.3}, "qformer": {"layer_norm_eps": 0.2}}, id="large epsilons"
    ),
]


def make(folder: Path, dtype: torch.dtype = torch.float32, **changes: Any) -> ImageEncoder:
    encoder = load_encoder(write_checkpoint(folder, Recipe("vision", seed=1, **changes)), dtype)
    for norm in encoder.modules():
        if isinstance(norm, nn.LayerNorm):
            norm.weight.uniform_(0.5, 1.5)
    return to_device(encoder)


def to_device(encoder: ImageEncoder) -> ImageEncoder:
    encoder.mean, encoder.std = encoder.mean.to(DEVICE), encoder.std.to(DEVICE)
    return encoder.to(DEVICE)


def pixels(images: int) -> Tensor:
    generator = torch.Generator().manual_seed(images)
    shape = (images, 3, 56, 56)
    return torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator).to(DEVICE)


@pytest.mark.parametrize("changes", RECIPES)
def test_features_are_transformers_in_float32(changes: dict[str, Any], tmp_path: Path) -> None:
    encoder = make(tmp_path, **changes)
    forward = vision.FusedEncoder(encoder, vision.Products())
    for images in (1, 3):
        expected = encoder(pixels(images))
        torch.testing.assert_close(forward(pixels(images)), expected, atol=1e-4, rtol=1e-4)
    assert (expected[0] - expected[1]).abs().max() > 0.1  # they depend on the image


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("padded", [False, True])
def test_features_in_half_precision_are_as_exact_as_transformers(
    dtype: torch.dtype, padded: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if padded:
        monkeypatch.setattr(vision, "SLOW_ROWS", range(50, 60))  # 3 images have 51
        monkeypatch.setattr(vision, "FAST_ROWS", 64)
    encoder = make(tmp_path, dtype)
    features = vision.FusedEncoder(encoder, vision.Products())(pixels(3))
    theirs = encoder(pixels(3))
    encoder.dtype = torch.float32
    exact = encoder.float()(pixels(3))
    assert features.dtype == dtype
    assert error(features, exact) < 1.2 * error(theirs, exact)


def error(found: Tensor, exact: Tensor) -> float:
    return float((found.float() - exact).norm() / exact.norm())


def test_the_encoder_itself_stays_as_it_is(tmp_path: Path) -> None:
    encoder = make(tmp_path)
    before = {name: tensor.clone() for name, tensor in encoder.state_dict().items()}
    vision.FusedEncoder(encoder, vision.Products())(pixels(1))
    vision.FusedEncoder(encoder, fp8.Fp8Products())
    for name, tensor in encoder.state_dict().items():
        torch.testing.assert_close(tensor, before[name], atol=0, rtol=0)


@pytest.mark.parametrize("part", ["vision", "qformer"])
def test_an_unusual_encoder_computes_by_itself(part: str, tmp_path: Path) -> None:
    encoder = make(tmp_path, **{part: {"hidden_act": "quick_gelu"}})
    assert device.fast_forward(encoder, None) is encoder
    with pytest.raises(StartupError, match=r"encoder\.quantize: fp8 .* GELU: leave it out"):
        device.fast_forward(encoder, "fp8")


def test_a_usual_encoder_is_fused(tmp_path: Path) -> None:
    encoder = make(tmp_path)
    for quantize in (None, "fp8"):
        assert isinstance(device.fast_forward(encoder, quantize), vision.FusedEncoder)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gelu_of_a_product(dtype: torch.dtype) -> None:
    rows, weight, bias = (randn(*shape).to(dtype) for shape in ((9, 32), (48, 32), (48,)))
    exact = gelu(linear(rows.float(), weight.float(), bias.float()))
    tolerance = 1e-4 if dtype == torch.float32 else 2e-2
    for given in (bias, None):
        if given is None:
            exact = gelu(linear(rows.float(), weight.float()))
        found = vision.linear_gelu(rows, weight, given)
        assert found.dtype == dtype
        torch.testing.assert_close(found.float(), exact, atol=tolerance, rtol=tolerance)


# -- fp8 -------------------------------------------------------------------------------------------


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE)


def to_fp8(x: Tensor) -> tuple[Tensor, Tensor]:
    """e4m3 values and scales of rows, by torch."""
    scales = x.float().abs().amax(1, keepdim=True).clamp_min(1e-12) / 448
    return (x.float() / scales).to(torch.float8_e4m3fn), scales


def same(rows: Any, expected: Tensor) -> None:
    """`rows` are `expected`, quantized; a value between two of e4m3's may become either."""
    values, scales = to_fp8(expected)
    torch.testing.assert_close(rows.scales, scales, atol=0, rtol=1e-4)
    different = (rows.values.float() - values.float()).abs()
    assert (different <= values.float().abs() / 8 + 2**-9).all()
    assert (different > 0).float().mean() < 0.02


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rows_are_quantized_with_a_scale_each(dtype: torch.dtype) -> None:
    x = (randn(4, 50) * torch.tensor([[1e-3], [1], [100], [0]], device=DEVICE)).to(dtype)
    same(fp8.quantize(x), x)
    same(fp8.quantize(x, gelu=True), gelu(x.float()))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_sum_is_normalised_and_quantized(dtype: torch.dtype) -> None:
    norm = nn.LayerNorm(48).to(DEVICE, dtype).requires_grad_(False)
    norm.weight.copy_(randn(48, seed=1))
    norm.bias.copy_(randn(48, seed=2))
    x, more = (randn(5, 48, seed=seed).to(dtype) * 5 + 3 for seed in (3, 4))
    total, rows = fp8.Fp8Products().add_norm(x, more.bfloat16(), norm)
    expected = add_norm(x, more.bfloat16().to(dtype), norm)[0]
    # The interpreter cuts off what it rounds to bfloat16.
    torch.testing.assert_close(total, expected, atol=0, rtol=1e-6 if dtype.itemsize == 4 else 1e-2)
    same(rows, norm.float()(total.float()))


@pytest.mark.parametrize("bias", [True, False])
def test_a_product_multiplies_what_was_rounded(bias: bool) -> None:
    layer = nn.Linear(48, 32, bias=bias).to(DEVICE).requires_grad_(False)
    layer.weight.mul_(torch.linspace(0.01, 30, 32, device=DEVICE)[:, None])
    x = randn(7, 48)
    products = fp8.Fp8Products()
    found = products.product(x, products.weights(layer))
    rounded = [values.float() * scales for values, scales in (to_fp8(x), to_fp8(layer.weight))]
    expected = linear(*rounded, layer.bias)
    assert found.dtype == torch.bfloat16
    torch.testing.assert_close(found.float(), expected, atol=2e-2, rtol=1e-2)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_features_in_fp8_are_close(dtype: torch.dtype, tmp_path: Path) -> None:
    """Random weights, so that errors of each layer are amplified by the next."""
    encoder = make(tmp_path, dtype)
    features = vision.FusedEncoder(encoder, fp8.Fp8Products())(pixels(2))
    exact = encoder(pixels(2))
    assert features.dtype == dtype
    flat = (features.float().flatten(1), exact.float().flatten(1))
    assert cosine_similarity(*flat).min() > 0.99


def test_widths_that_fp8_cannot_multiply_are_refused() -> None:
    with pytest.raises(StartupError, match=r"encoder\.quantize: fp8 .* 40 and 32: leave it out"):
        fp8.Fp8Products().weights(nn.Linear(40, 32))


def test_fp8_is_refused_on_a_cpu() -> None:
    with pytest.raises(StartupError, match=r"encoder\.quantize: fp8 needs a GPU .* leave it out"):
        check_quantize(torch.device("cpu"), "fp8")


async def test_neither_the_start_nor_a_replica_goes_on_with_fp8_on_a_cpu() -> None:
    config = AppConfig.model_validate({"device": "cpu", "encoder": {"quantize": "fp8"}})
    with pytest.raises(StartupError, match=r"encoder\.quantize: fp8 needs a GPU"):
        preflight.check_model(config, local=True)
    _, loaded = replica(Encoder, config, "cpu")
    with pytest.raises(StartupError, match=r"encoder\.quantize: fp8 needs a GPU"):
        await loaded


@pytest.mark.parametrize(("capability", "fits"), [((8, 6), False), ((8, 9), True), ((9, 0), True)])
def test_fp8_needs_a_gpu_that_has_it(
    capability: tuple[int, int], fits: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: capability)
    if fits:
        check_quantize(torch.device("cuda"), "fp8")
        return
    with pytest.raises(StartupError, match=r"compute capability 8\.9"):
        check_quantize(torch.device("cuda"), "fp8")
