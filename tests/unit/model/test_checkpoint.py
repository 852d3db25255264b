"""Each half of a checkpoint loads on its own, from any layout and into any dtype."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from transformers import Blip2Config, Blip2ForConditionalGeneration

from blip2_serve.errors import StartupError
from blip2_serve.model.checkpoint import (
    eos_token_ids,
    longest_sequence,
    open_checkpoint,
    resolve_dtype,
)
from blip2_serve.model.decoder import OptDecoder
from blip2_serve.model.processor import ImageProcessor
from support.checkpoints import Recipe, load_encoder, write_checkpoint
from support.oracle import Oracle

CPU = torch.device("cpu")
RECIPE = Recipe("unit", seed=5)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("unit"), RECIPE)


def load_decoder(folder: Path, dtype: torch.dtype = torch.float32) -> OptDecoder:
    return OptDecoder.load(open_checkpoint(str(folder)), CPU, dtype)


def parameters(*modules: nn.Module) -> dict[str, Tensor]:
    return {name: p for module in modules for name, p in module.named_parameters()}


@pytest.mark.parametrize("layout", ["single", "sharded", "bin"])
@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_both_halves_together_have_all_tensors_in_every_layout(
    layout: str, tied: bool, tmp_path: Path
) -> None:
    folder = write_checkpoint(tmp_path, replace(RECIPE, layout=layout, tied=tied))
    assert len(list(folder.glob("*.safetensors")) + list(folder.glob("*.bin"))) > (
        layout != "single"
    )
    whole = dict(Oracle(folder).model.named_parameters())
    decoder = load_decoder(folder)
    own = {**load_encoder(folder).state_dict(), **decoder.checkpoint_tensors()}
    assert own.keys() == whole.keys()
    assert all(torch.equal(own[name], whole[name]) for name in whole)
    assert (decoder.lm_head.weight is decoder.embed_tokens.weight) == tied


def test_each_half_reads_only_its_own_files(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path, replace(RECIPE, layout="sharded"))
    index = json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"]
    language = {f for name, f in index.items() if name.startswith("language_model")}
    vision = {f for name, f in index.items() if not name.startswith("language_model")}
    for file in language - vision:
        (folder / file).write_bytes(b"not for the encoder")
    load_encoder(folder)
    with pytest.raises(Exception, match=r"(?i)header|safetensors"):
        load_decoder(folder)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_parameters_have_the_dtypes_of_transformers(dtype: torch.dtype, folder: Path) -> None:
    reference = dict(
        Blip2ForConditionalGeneration.from_pretrained(folder, dtype=dtype).named_parameters()
    )
    own = parameters(load_encoder(folder, dtype))
    assert {name: p.dtype for name, p in own.items()} == {
        name: reference[name].dtype for name in own
    }
    assert all(torch.equal(p, reference[name]) for name, p in own.items())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_image_features_equal_those_of_transformers(dtype: torch.dtype, folder: Path) -> None:
    pixels = torch.randint(0, 256, (3, 3, 56, 56), dtype=torch.uint8)
    reference = Blip2ForConditionalGeneration.from_pretrained(folder, dtype=dtype).eval()
    processor = ImageProcessor.load(folder)
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in (processor.mean, processor.std))
    normalised = (pixels * processor.rescale - mean) / std
    with torch.inference_mode():
        expected = reference.get_image_features(normalised.to(dtype))
    expected = getattr(expected, "pooler_output", expected)
    features = load_encoder(folder, dtype)(pixels)
    assert features.shape == (3, RECIPE.queries, RECIPE.width)
    assert features.dtype == dtype
    torch.testing.assert_close(features, expected.view_as(features))


def copy_with_more(folder: Path, target: Path, key: str, more: int) -> None:
    """Copies a checkpoint and increases a number in its text config."""
    shutil.copytree(folder, target, dirs_exist_ok=True)
    config = json.loads((target / "config.json").read_text())
    config["text_config"][key] += more
    (target / "config.json").write_text(json.dumps(config))


def test_a_missing_tensor_is_named_in_a_startup_error(folder: Path, tmp_path: Path) -> None:
    copy_with_more(folder, tmp_path, "num_hidden_layers", 1)
    with pytest.raises(StartupError, match=r"layers\.2"):
        load_decoder(tmp_path)


def test_a_tensor_of_another_shape_is_a_startup_error(folder: Path, tmp_path: Path) -> None:
    copy_with_more(folder, tmp_path, "ffn_dim", 8)
    with pytest.raises(StartupError, match="fc1"):
        load_decoder(tmp_path)


def test_a_folder_without_weights_is_a_startup_error(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_bytes((folder / "config.json").read_bytes())
    with pytest.raises(StartupError, match="no weights"):
        open_checkpoint(str(tmp_path))


@pytest.mark.parametrize(("eos", "ids"), [(7, (7,)), ([7, 9], (7, 9)), (None, ())])
def test_eos_ids_come_from_the_text_config(eos: object, ids: tuple[int, ...]) -> None:
    config = Blip2Config(text_config={"model_type": "opt", "eos_token_id": eos})
    assert eos_token_ids(config) == ids


def test_auto_dtype_is_float32_on_a_cpu_and_half_precision_on_a_gpu() -> None:
    config = Blip2Config()
    assert resolve_dtype("auto", CPU, config) == torch.float32
    gpu = torch.device("cuda")
    assert resolve_dtype("auto", gpu, config) == torch.bfloat16
    config.dtype = torch.float16
    assert resolve_dtype("auto", gpu, config) == torch.float16
    assert resolve_dtype("bfloat16", CPU, config) == torch.bfloat16


def test_max_model_len_must_lie_within_the_models_positions() -> None:
    config = Blip2Config(text_config={"model_type": "opt", "max_position_embeddings": 128})
    assert longest_sequence(config, None) == 128
    assert longest_sequence(config, 100) == 100
    for max_model_len in (129, 33):  # 32 queries, BOS and a token need 34
        with pytest.raises(StartupError, match="34 to 128"):
            longest_sequence(config, max_model_len)
