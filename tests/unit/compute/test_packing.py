"""Packed layers compute what transformers' plain ones do, up to the rounding of bfloat16."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from transformers import OPTConfig

from blip2_serve.compute.cpu import dot_product
from blip2_serve.compute.cpu.device import CpuDevice
from blip2_serve.compute.cpu.linear import (
    DotLinear,
    OneDnnLinear,
    for_few_rows,
    for_images,
    packable,
)
from blip2_serve.compute.cpu.vision import PackedPatches, pack_vision
from blip2_serve.model.checkpoint import open_checkpoint
from blip2_serve.model.decoder import OptDecoder
from blip2_serve.model.packing import replace_with_activation
from blip2_serve.model.processor import ImageProcessor
from blip2_serve.model.vision import ImageEncoder
from support.checkpoints import Recipe, write_checkpoint

pytestmark = pytest.mark.skipif(
    not packable(torch.empty(1, dtype=torch.bfloat16)),
    reason="this CPU or this torch packs no bfloat16",
)


def error(result: Tensor, exact: Tensor) -> float:
    """Norm of the difference by norm of the exact result."""
    return float((result.float() - exact).norm() / exact.norm())


def encoder(folder: Path, dtype: torch.dtype) -> ImageEncoder:
    checkpoint = open_checkpoint(str(folder), None)
    processor = ImageProcessor.load(folder)
    return ImageEncoder.load(checkpoint, processor, torch.device("cpu"), dtype)


def test_a_packed_encoder_is_as_near_to_float32_as_the_plain_one(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, Recipe("seeing", seed=1))
    images = torch.randint(0, 256, (3, 3, 56, 56), dtype=torch.uint8)
    exact = encoder(tmp_path, torch.float32)(images)
    plain, packed = (encoder(tmp_path, torch.bfloat16) for _ in range(2))
    pack_vision(packed)

    assert not any(isinstance(m, nn.Linear | nn.Conv2d) for m in packed.modules())
    assert 0 < error(packed(images), exact) < 1.5 * error(plain(images), exact)


def test_packing_leaves_float32_alone(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, Recipe("seeing", seed=1))
    images = torch.randint(0, 256, (2, 3, 56, 56), dtype=torch.uint8)
    packed = encoder(tmp_path, torch.float32)
    expected = packed(images)
    pack_vision(packed)
    assert torch.equal(packed(images), expected)


def test_an_image_is_encoded_alike_alone_and_in_company(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, Recipe("seeing", seed=1))
    packed = encoder(tmp_path, torch.bfloat16)
    pack_vision(packed)
    images = torch.randint(0, 256, (4, 3, 56, 56), dtype=torch.uint8)
    together = packed(images)
    for i in range(4):
        torch.testing.assert_close(packed(images[i : i + 1])[0], together[i], atol=0.05, rtol=0.05)


def test_patches_are_what_the_convolution_makes_of_them() -> None:
    torch.manual_seed(0)
    convolution = nn.Conv2d(3, 8, kernel_size=4, stride=4).requires_grad_(False)
    pixels = torch.randn(2, 3, 12, 20)
    expected = convolution(pixels)
    seen = PackedPatches(convolution.bfloat16())(pixels.bfloat16())
    assert seen.shape == expected.shape == (2, 8, 3, 5)
    assert error(seen, expected) < 0.01


@pytest.mark.parametrize(
    ("name", "activation"), [("relu", torch.relu), ("gelu", nn.functional.gelu)]
)
def test_an_activation_may_be_part_of_the_layer(name: str, activation: object) -> None:
    torch.manual_seed(0)
    module = nn.ModuleDict({"fc": nn.Linear(16, 8), "act": nn.Tanh()}).requires_grad_(False)
    x = torch.randn(5, 16)
    expected = activation(module["fc"](x))  # type: ignore[operator]
    module.bfloat16()
    replace_with_activation(module, "fc", "act", name, for_images)
    assert isinstance(module["act"], nn.Identity)
    assert error(module["fc"](x.bfloat16()), expected) < 0.01


def test_an_activation_that_the_library_does_not_have_stays() -> None:
    module = nn.ModuleDict({"fc": nn.Linear(16, 8).bfloat16(), "act": nn.Tanh()})
    replace_with_activation(module, "fc", "act", "tanh", for_images)
    assert isinstance(module["act"], nn.Tanh)
    assert not isinstance(module["fc"], OneDnnLinear)


def test_a_packed_decoder_has_its_activations_inside() -> None:
    config = OPTConfig(
        hidden_size=32,
        word_embed_proj_dim=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        ffn_dim=64,
        vocab_size=50,
    )
    decoder = OptDecoder(config).bfloat16().eval().requires_grad_(False)
    CpuDevice(torch.device("cpu")).prepare_decoder(decoder)
    for layer in decoder.layers:
        assert isinstance(layer.activation, nn.Identity)
        assert (layer.fc1(torch.randn(3, 32, dtype=torch.bfloat16)) >= 0).all()


@pytest.mark.skipif(not dot_product.available(), reason="this CPU has other layers for few rows")
@pytest.mark.parametrize(
    ("shape", "activation", "kind"),
    [
        pytest.param((96, 32), "none", DotLinear, id="whole blocks"),
        pytest.param((96, 32), "relu", DotLinear, id="whole blocks and a relu"),
        pytest.param((90, 32), "none", OneDnnLinear, id="a block that is not whole"),
        pytest.param((90, 32), "gelu", OneDnnLinear, id="what only oneDNN can do"),
        pytest.param((96, 32), "gelu", type(None), id="an activation that the kernel lacks"),
    ],
)
def test_few_rows_have_the_kernel_where_it_fits(
    shape: tuple[int, int], activation: str, kind: type
) -> None:
    torch.manual_seed(0)
    layer = nn.Linear(shape[1], shape[0]).requires_grad_(False)
    x = torch.randn(5, shape[1])
    expected = layer(x).relu() if activation == "relu" else layer(x)
    packed = for_few_rows(layer.bfloat16(), activation)
    assert isinstance(packed, kind)
    if packed and activation != "gelu":
        assert error(packed(x.bfloat16()), expected) < 0.01


def test_a_layer_for_few_rows_needs_no_bias() -> None:
    torch.manual_seed(0)
    layer = nn.Linear(32, 96, bias=False).requires_grad_(False)
    x = torch.randn(5, 32)
    expected = layer(x)
    packed = for_few_rows(layer.bfloat16(), "none")
    assert packed is not None
    assert error(packed(x.bfloat16()), expected) < 0.01
