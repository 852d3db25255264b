"""int8 weights: how far off they are, in one layer and in a decoder."""

from __future__ import annotations

import gc
import weakref
from array import array

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import linear
from transformers import OPTConfig

from blip2_serve.compute.cpu import int8_product
from blip2_serve.compute.cpu.device import CpuDevice
from blip2_serve.compute.cpu.int8 import Int8Linear, quantize_decoder, quantized
from blip2_serve.compute.devices import check_quantize
from blip2_serve.compute.runner import Runner
from blip2_serve.engine.sequence import Chunk, Request, Sequence
from blip2_serve.errors import StartupError
from blip2_serve.model.decoder import OptDecoder
from blip2_serve.types import SamplingParams

needs_vnni = pytest.mark.skipif(
    not int8_product.available(), reason="this CPU lacks AVX512-VNNI, which int8 weights need"
)

IN, OUT = 200, 70  # no multiples of the kernel's tiles


@pytest.fixture
def plain() -> nn.Linear:
    torch.manual_seed(0)
    return nn.Linear(IN, OUT).requires_grad_(False)


def dequantized(plain: nn.Linear) -> Tensor:
    """What the int8 weight stands for, float64 [out, in]."""
    weight, scales = quantized(plain.weight)
    return weight.double() * scales.double()[:, None]


def test_weights_are_off_by_half_a_step_of_their_channel(plain: nn.Linear) -> None:
    plain.weight[3] *= 1000  # a channel's scale is its own
    step = plain.weight.abs().amax(1, keepdim=True) / 127

    assert ((plain.weight - dequantized(plain)).abs() <= 0.501 * step).all()


@needs_vnni
@pytest.mark.parametrize("bias", [True, False], ids=["with a bias", "without"])
def test_a_layer_is_close_to_the_plain_one(bias: bool) -> None:
    torch.manual_seed(0)
    plain = nn.Linear(IN, OUT, bias=bias).requires_grad_(False)
    x = torch.randn(50, IN)
    products = linear(x, plain.weight)
    off = Int8Linear(plain)(x) - plain(x)

    assert off.norm() < 0.006 * products.norm()


@needs_vnni
def test_a_channel_of_zeros_gives_the_bias(plain: nn.Linear) -> None:
    plain.weight[5] = 0

    assert torch.equal(Int8Linear(plain)(torch.randn(3, IN))[:, 5], plain.bias[5].expand(3))


ODD, WHOLE = 60, 64  # vocabularies: one leaves a tile of the kernel incomplete


def decoder(dtype: torch.dtype, vocabulary: int = ODD, *, norm_first: bool = True) -> OptDecoder:
    config = OPTConfig(
        vocab_size=vocabulary,
        hidden_size=32,
        word_embed_proj_dim=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        ffn_dim=64,
        max_position_embeddings=64,
        do_layer_norm_before=norm_first,
    )
    torch.manual_seed(0)
    made = OptDecoder(config).eval().requires_grad_(False)
    for parameter in made.parameters():
        parameter.normal_(std=0.4)
    return made.to(dtype)


def logits(model: OptDecoder, dtype: torch.dtype) -> Tensor:
    """After a prompt that begins with an image, computed in two steps."""
    image = torch.randn(3, 32, generator=torch.Generator().manual_seed(1)).to(dtype)
    vocabulary = model.config.vocab_size
    request = Request("a", [59] * 3 + [5, 6, 7, 8], image, "", SamplingParams())
    sequence = Sequence(request, slots=array("q", range(1, 8)))
    runner = Runner(model, CpuDevice(torch.device("cpu")), 10, max_num_seqs=1, max_len=10)
    assert runner.run([Chunk(sequence, 0, 5)]).shape == (0, vocabulary)
    return runner.run([Chunk(sequence, 5, 7)])


def rounded(model: OptDecoder) -> OptDecoder:
    """The same in float32 with the weights that int8 stands for."""
    model.float()
    hidden, vocabulary = model.config.hidden_size, model.config.vocab_size
    head = nn.Linear(hidden, vocabulary, bias=False)  # tied to the embeddings, not rounded
    head.weight = nn.Parameter(dequantized(model.lm_head).float())
    for module in model.layers.modules():
        if isinstance(module, nn.Linear):
            module.weight.copy_(dequantized(module))
    model.lm_head = head
    return model


@needs_vnni
@pytest.mark.parametrize("norm_first", [True, False], ids=["norms first", "norms last"])
@pytest.mark.parametrize("vocabulary", [ODD, WHOLE])
@pytest.mark.parametrize(
    ("dtype", "tolerance"),
    [(torch.float32, 1e-3), (torch.bfloat16, 0.1), (torch.float16, 0.02)],
    ids=str,
)
def test_a_decoder_keeps_its_dtype_and_has_activations_inside(
    dtype: torch.dtype, tolerance: float, vocabulary: int, norm_first: bool
) -> None:
    model = decoder(dtype, vocabulary, norm_first=norm_first)
    quantize_decoder(model)

    assert isinstance(model.lm_head, Int8Linear)
    assert all(isinstance(layer.activation, nn.Identity) for layer in model.layers)
    assert model.embed_tokens.weight.dtype == dtype
    expected = logits(rounded(decoder(dtype, vocabulary, norm_first=norm_first)), dtype)
    off = (logits(model, dtype) - expected).norm() / expected.norm()
    assert off < tolerance


@needs_vnni
@pytest.mark.parametrize("vocabulary", [ODD, WHOLE])
def test_the_plain_weights_are_gone(vocabulary: int) -> None:
    model = decoder(torch.bfloat16, vocabulary)
    weights = [weakref.ref(m.weight) for m in model.layers.modules() if isinstance(m, nn.Linear)]
    quantize_decoder(model)
    gc.collect()

    assert len(weights) == 8
    assert not any(weight() is not None for weight in weights)
    assert not any(isinstance(module, nn.Linear) for module in model.modules())


def test_another_device_is_refused_with_the_flags_that_help() -> None:
    with pytest.raises(StartupError, match=r"--quantize int8 .* --device cpu"):
        check_quantize(torch.device("cuda"), "int8")


def test_a_cpu_without_the_instruction_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(int8_product, "available", lambda: False)
    with pytest.raises(StartupError, match=r"--quantize int8 .* AVX512-VNNI.* leave it out"):
        check_quantize(torch.device("cpu"), "int8")


def test_a_cpu_with_the_instruction_is_accepted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(int8_product, "available", lambda: True)
    check_quantize(torch.device("cpu"), "int8")
