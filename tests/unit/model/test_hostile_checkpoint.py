"""Checkpoints that were made to do harm, or are broken: they run nothing, and are refused by name.

The marks show that the attacks work where nobody is careful.
"""

from __future__ import annotations

import json
import pickle
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from blip2_serve.errors import StartupError
from blip2_serve.model.checkpoint import open_checkpoint, read_config
from blip2_serve.model.decoder import OptDecoder
from blip2_serve.model.processor import ImageProcessor
from blip2_serve.model.tokenizer import Tokenizer
from support.checkpoints import Recipe, load_encoder, write_checkpoint

CPU = torch.device("cpu")
RECIPE = Recipe("hostile", seed=8)
TRUSTING = """
import sys, transformers
transformers.AutoTokenizer.from_pretrained(sys.argv[1], trust_remote_code=True)
"""


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("made"), RECIPE)


@pytest.fixture
def folder(made: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(made, tmp_path / "checkpoint"))


def load_decoder(folder: Path, dtype: torch.dtype = torch.float32) -> OptDecoder:
    return OptDecoder.load(open_checkpoint(str(folder)), CPU, dtype)


def change(folder: Path, edit: Callable[[dict[str, Any]], None]) -> None:
    """Edits the tensors of a checkpoint."""
    file = folder / "model.safetensors"
    tensors = load_file(file)
    edit(tensors)
    save_file(tensors, file, metadata={"format": "pt"})


class Mark:
    """Makes a file when it is unpickled."""

    def __init__(self, file: Path) -> None:
        self._file = file

    def __reduce__(self) -> Any:
        return Path.touch, (self._file,)


@pytest.mark.parametrize("layout", ["single", "sharded"])
def test_a_pickle_runs_nothing(made: Path, tmp_path: Path, layout: str) -> None:
    folder = write_checkpoint(tmp_path / "bin", replace(RECIPE, layout="bin"))
    mark = tmp_path / "mark"
    names = sorted(file.name for file in folder.glob("*.bin"))
    for file in folder.glob("*.bin*"):
        file.unlink()
    poisoned = folder / "pytorch_model.bin"
    if layout == "sharded":
        poisoned = folder / names[0]
        index = {"weight_map": dict.fromkeys(open_checkpoint(str(made)).files, poisoned.name)}
        (folder / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    torch.save({"query_tokens": torch.zeros(1), "x": Mark(mark)}, poisoned)

    with pytest.raises(StartupError, match=poisoned.name):
        load_encoder(folder)
    assert not mark.exists()

    torch.load(poisoned, weights_only=False)
    assert mark.exists()


def test_a_pickle_named_as_safetensors_runs_nothing(folder: Path, tmp_path: Path) -> None:
    file, mark = folder / "model.safetensors", tmp_path / "mark"
    file.write_bytes(pickle.dumps(Mark(mark)))

    with pytest.raises(StartupError, match=r"cannot read .*model\.safetensors"):
        load_decoder(folder)
    assert not mark.exists()
    pickle.loads(file.read_bytes())
    assert mark.exists()


def test_code_of_a_checkpoint_is_never_run(folder: Path, tmp_path: Path) -> None:
    """vLLM CVE-2026-22807: a config's `auto_map` names code that is run, asked for or not."""
    mark = tmp_path / "mark"
    (folder / "evil.py").write_text(
        f"import pathlib\npathlib.Path({str(mark)!r}).touch()\n"
        "from transformers import GPT2TokenizerFast as Evil\n"
        "from transformers import Blip2Config as EvilConfig\n"
    )
    auto_map = {
        "AutoConfig": "evil.EvilConfig",
        "AutoTokenizer": ["evil.Evil", "evil.Evil"],
        "AutoImageProcessor": "evil.Evil",
        "AutoProcessor": "evil.Evil",
    }
    for name in ("config.json", "tokenizer_config.json", "processor_config.json"):
        file = folder / name
        values = json.loads(file.read_text()) if file.exists() else {}
        file.write_text(json.dumps({**values, "auto_map": auto_map}))

    Tokenizer(folder, read_config(folder))
    ImageProcessor.load(folder)
    load_decoder(folder)
    load_encoder(folder)
    assert not mark.exists()

    # In a process of its own: transformers would register the class for all tests.
    subprocess.run([sys.executable, "-c", TRUSTING, folder], check=True)
    assert mark.exists()


@pytest.mark.parametrize(
    "name", ["../outside.safetensors", "/etc/passwd", "a/b.safetensors", "..", ""]
)
def test_an_index_leads_nowhere_else(folder: Path, name: str) -> None:
    shutil.copy(folder / "model.safetensors", folder.parent / "outside.safetensors")
    (folder / "model.safetensors").unlink()
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"query_tokens": name}}))

    with pytest.raises(StartupError, match=r"index\.json"):
        open_checkpoint(str(folder))


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"weight_map": 1}', '{"weight_map": {"a": 1}}'])
def test_a_broken_index_is_named(folder: Path, text: str) -> None:
    (folder / "model.safetensors.index.json").write_text(text)

    with pytest.raises(StartupError, match=r"index\.json"):
        open_checkpoint(str(folder))


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("half", ["vision_model", "language_model"])
def test_a_tensor_with_a_value_that_is_not_finite_is_named(
    folder: Path, value: float, half: str
) -> None:
    named: list[str] = []

    def edit(tensors: dict[str, Any]) -> None:
        named.append(next(n for n in tensors if n.startswith(half) and "fc1.weight" in n))
        tensors[named[0]][3, 5] = value

    change(folder, edit)
    load = load_encoder if half == "vision_model" else load_decoder
    with pytest.raises(StartupError, match=rf"{named[0]} has values that are not finite"):
        load(folder)


def test_a_value_that_is_too_large_for_the_dtype_is_not_finite(folder: Path) -> None:
    def edit(tensors: dict[str, Any]) -> None:
        name = next(n for n in tensors if "fc1.weight" in n and n.startswith("language_model"))
        tensors[name][0, 0] = 1e5

    change(folder, edit)
    load_decoder(folder)
    with pytest.raises(StartupError, match="not finite in float16"):
        load_decoder(folder, torch.float16)


def test_more_layers_than_the_config_has_are_refused(folder: Path) -> None:
    for part in ("language_model.model.decoder.layers", "vision_model.encoder.layers"):

        def add(tensors: dict[str, Any], part: str = part) -> None:
            one = {n.replace(".1.", ".2."): t for n, t in tensors.items() if f"{part}.1." in n}
            assert one
            tensors |= {name: tensor.clone() for name, tensor in one.items()}

        change(folder, add)
    for load in (load_encoder, load_decoder):
        with pytest.raises(StartupError, match=r"layers\.2\."):
            load(folder)


def test_buffers_that_the_model_does_not_have_are_left_alone(folder: Path) -> None:
    """Checkpoints of earlier versions of transformers have such."""
    more = {
        "qformer.embeddings.position_ids": torch.zeros(1, 8, dtype=torch.int64),
        "language_model.lm_head.weight": torch.zeros(8, 8),  # tied
    }
    change(folder, lambda tensors: tensors.update(more))

    load_encoder(folder)
    load_decoder(folder)
