"""Linear layers for few rows: on a GPU if there is one, else in Triton's interpreter."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import linear as torch_linear
from transformers import OPTConfig

from blip2_serve.model.decoder import Attend, OptDecoder
from support.device import DEVICE

NO_TRITON = "Triton is not installed: torch for GPUs brings it, and so do the tests on x86-64 Linux"
linear = pytest.importorskip("blip2_serve.compute.cuda.linear", reason=NO_TRITON)
CudaDevice = pytest.importorskip("blip2_serve.compute.cuda.device", reason=NO_TRITON).CudaDevice

pytestmark = pytest.mark.slow  # Triton's interpreter is
SHAPE = linear.Shape(4, 512, 2)


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("rows", [1, 2, 3])
@pytest.mark.parametrize(
    ("dtype", "tolerance"),
    [
        pytest.param(torch.float32, 1e-5, id="float32"),
        pytest.param(torch.float16, 1e-3, id="float16"),
        pytest.param(torch.bfloat16, 1e-2, id="bfloat16"),
    ],
)
def test_few_rows_match_torch(dtype: torch.dtype, tolerance: float, rows: int) -> None:
    """Neither 37 outputs nor 600 or 40 inputs are multiples of the blocks."""
    for inputs, relu, bias in ((600, True, randn(37, seed=2)), (40, False, None)):
        x = randn(rows, inputs).to(DEVICE, dtype)
        weight = (randn(37, inputs, seed=1) / inputs**0.5).to(DEVICE, dtype)
        bias = None if bias is None else bias.to(DEVICE, dtype)
        expected = torch_linear(x.float(), weight.float(), None if bias is None else bias.float())
        expected = expected.relu() if relu else expected
        # Of a wider tensor: rows that do not follow one another, and neighbours that must stay.
        x = torch.stack((x, torch.full_like(x, torch.nan)), 1)[:, 0]

        y = linear.linear(x, weight, bias, SHAPE, relu=relu)
        unrounded = linear.linear(x, weight, bias, SHAPE, relu=relu, dtype=torch.float32)

        assert y.dtype == dtype
        torch.testing.assert_close(y.float(), expected, atol=tolerance, rtol=tolerance)
        torch.testing.assert_close(unrounded, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("dtype", "tolerance"),
    [
        pytest.param(torch.float32, 1e-5, id="float32"),
        pytest.param(torch.float16, 2e-3, id="float16"),
    ],
)
def test_any_number_of_rows_is_computed(dtype: torch.dtype, tolerance: float) -> None:
    layer = nn.Linear(600, 40, device=DEVICE, dtype=dtype).requires_grad_(False)
    few = linear.FewRowsLinear(layer, relu=True)
    for rows in (0, 1, 2, 3, 9):
        x = randn(rows, 600).to(DEVICE, dtype)
        torch.testing.assert_close(few(x), layer(x).relu(), atol=tolerance, rtol=tolerance)


def test_the_shape_goes_by_rows_and_width() -> None:
    for rows, shapes in linear.SHAPES.items():
        for most, shape in shapes:
            assert linear.choose(rows, most) is shape
    assert linear.choose(max(linear.SHAPES) + 1, 1) is None


def decoder(activation: str = "relu", *, tied: bool = True, bias: bool = True) -> OptDecoder:
    config = OPTConfig(
        hidden_size=32,
        word_embed_proj_dim=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        ffn_dim=64,
        vocab_size=50,
        max_position_embeddings=40,
        activation_function=activation,
        tie_word_embeddings=tied,
        enable_bias=bias,
    )
    torch.manual_seed(0)
    made = OptDecoder(config).eval().requires_grad_(False).to(DEVICE)
    made.embed_tokens.weight.normal_()
    made.embed_positions.weight.normal_()
    return made


def logits(model: OptDecoder, tokens: int) -> Tensor:
    def attend(_layer: int, qkv: Tensor) -> Tensor:
        return qkv.sum(1)

    attending: Attend = attend
    ids = torch.arange(tokens, device=DEVICE)
    return model.logits(model(model.embed_tokens(ids), ids, attending))


@pytest.mark.parametrize(
    ("activation", "tied", "bias"),
    [("relu", True, True), ("gelu", True, True), ("relu", False, False)],
)
def test_a_prepared_decoder_computes_the_same(activation: str, tied: bool, bias: bool) -> None:
    model = decoder(activation, tied=tied, bias=bias)
    expected = {tokens: logits(model, tokens) for tokens in (1, 3, 8, 20)}
    assert CudaDevice(DEVICE).prepare_decoder(model) == 1
    for layer in model.layers:
        assert isinstance(layer.activation, nn.Identity) == (activation == "relu")
    for tokens, plain in expected.items():
        torch.testing.assert_close(logits(model, tokens), plain, atol=1e-5, rtol=1e-5)


def test_preparing_copies_no_weight_and_keeps_the_head_tied() -> None:
    model = decoder()
    before = {name: value.data_ptr() for name, value in model.checkpoint_tensors().items()}
    CudaDevice(DEVICE).prepare_decoder(model)
    after = {name: value.data_ptr() for name, value in model.checkpoint_tensors().items()}
    assert after == before
    assert model.lm_head.weight is model.embed_tokens.weight
    assert not any(isinstance(module, nn.Linear) for module in model.modules())


@pytest.mark.parametrize(("rows", "rounded"), [(1, False), (9, True)])
def test_logits_of_few_rows_are_not_rounded(rows: int, rounded: bool) -> None:
    model = decoder().half()
    CudaDevice(DEVICE).prepare_decoder(model)
    hidden = randn(rows, 32).to(DEVICE, torch.float16)
    result = model.logits(hidden)
    assert result.dtype == torch.float32
    assert torch.equal(result, result.half().float()) == rounded
