"""Packed layers match transformers' plain ones up to bfloat16 rounding."""

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
from blip2_serve.model.decoder import OptDecoder
from blip2_serve.model.packing import replace_with_activation
from support.checkpoints import Recipe, load_encoder, write_checkpoint

pytestmark = pytest.mark.skipif(
    not packable(torch.empty(1, dtype=torch.bfloat16)),
    reason="this CPU or this build of torch cannot pack bfloat16 weights",
)


def error(result: Tensor, exact: Tensor) -> float:
    """Returns the norm of the difference, relative to that of the exact result."""
    return float((result.float() - exact).norm() / exact.norm())


def test_a_packed_encoder_is_about_as_accurate_as_a_plain_one(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, Recipe("vision", seed=1))
    images = torch.randint(0, 256, (3, 3, 56, 56), dtype=torch.uint8)
    exact = load_encoder(tmp_path, torch.float32)(images)
    plain, packed = (load_encoder(tmp_path, torch.bfloat16) for _ in range(2))
    pack_vision(packed)

    assert not any(isinstance(m, nn.Linear | nn.Conv2d) for m in packed.modules())
    assert 0 < error(packed(images), exact) < 1.5 * error(plain(images), exact)


def test_packing_does_not_change_float32(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, Recipe("vision", seed=1))
    images = torch.randint(0, 256, (2, 3, 56, 56), dtype=torch.uint8)
    packed = load_encoder(tmp_path, torch.float32)
    expected = packed(images)
    pack_vision(packed)
    assert torch.equal(packed(images), expected)


def test_features_do_not_depend_on_the_batch(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, Recipe("vision", seed=1))
    packed = load_encoder(tmp_path, torch.bfloat16)
    pack_vision(packed)
    images = torch.randint(0, 256, (4, 3, 56, 56), dtype=torch.uint8)
    together = packed(images)
    for i in range(4):
        torch.testing.assert_close(packed(images[i : i + 1])[0], together[i], atol=0.05, rtol=0.05)


def test_packed_patches_match_the_convolution() -> None:
    torch.manual_seed(0)
    convolution = nn.Conv2d(3, 8, kernel_size=4, stride=4).requires_grad_(False)
    pixels = torch.randn(2, 3, 12, 20)
    expected = convolution(pixels)
    patches = PackedPatches(convolution.bfloat16())(pixels.bfloat16())
    assert patches.shape == expected.shape == (2, 8, 3, 5)
    assert error(patches, expected) < 0.01


@pytest.mark.parametrize(
    ("name", "activation"), [("relu", torch.relu), ("gelu", nn.functional.gelu)]
)
def test_an_activation_can_be_fused_into_the_layer(name: str, activation: object) -> None:
    torch.manual_seed(0)
    module = nn.ModuleDict({"fc": nn.Linear(16, 8), "act": nn.Tanh()}).requires_grad_(False)
    x = torch.randn(5, 16)
    expected = activation(module["fc"](x))  # type: ignore[operator]
    module.bfloat16()
    replace_with_activation(module, "fc", "act", name, for_images)
    assert isinstance(module["act"], nn.Identity)
    assert error(module["fc"](x.bfloat16()), expected) < 0.01


def test_an_unsupported_activation_is_not_fused() -> None:
    module = nn.ModuleDict({"fc": nn.Linear(16, 8).bfloat16(), "act": nn.Tanh()})
    replace_with_activation(module, "fc", "act", "tanh", for_images)
    assert isinstance(module["act"], nn.Tanh)
    assert not isinstance(module["fc"], OneDnnLinear)


def test_packing_a_decoder_fuses_its_activations() -> None:
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


@pytest.mark.skipif(not dot_product.available(), reason="this CPU lacks bfloat16 dot products")
@pytest.mark.parametrize(
    ("shape", "activation", "kind"),
    [
        pytest.param((96, 32), "none", DotLinear, id="full blocks"),
        pytest.param((96, 32), "relu", DotLinear, id="full blocks with relu"),
        pytest.param((90, 32), "none", OneDnnLinear, id="partial block"),
        pytest.param((90, 32), "gelu", OneDnnLinear, id="partial block with gelu"),
        pytest.param((96, 32), "gelu", type(None), id="activation that the kernel lacks"),
    ],
)
def test_layers_for_few_rows_use_the_kernel_if_it_fits(
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


def test_layers_for_few_rows_work_without_bias() -> None:
    torch.manual_seed(0)
    layer = nn.Linear(32, 96, bias=False).requires_grad_(False)
    x = torch.randn(5, 32)
    expected = layer(x)
    packed = for_few_rows(layer.bfloat16(), "none")
    assert packed is not None
    assert error(packed(x.bfloat16()), expected) < 0.01
