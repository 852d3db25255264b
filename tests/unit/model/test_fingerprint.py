"""A fingerprint tells models apart, by content and by how they are served, and not by path."""

from __future__ import annotations

import json
import os
import re
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from blip2_serve.errors import StartupError
from blip2_serve.model import fingerprint as module
from blip2_serve.model.fingerprint import PAGE_BYTES, PAGES, fingerprint
from blip2_serve.model.source import DEMO_FOLDER


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return Path(shutil.copytree(DEMO_FOLDER, tmp_path / "checkpoint"))


def sharded(folder: Path) -> Path:
    tensors = load_file(folder / "model.safetensors")
    names = sorted(tensors)
    files = {"model-1.safetensors": names[::2], "model-2.safetensors": names[1::2]}
    for file, own in files.items():
        save_file({name: tensors[name] for name in own}, folder / file)
    weight_map = {name: file for file, own in files.items() for name in own}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    (folder / "model.safetensors").unlink()
    return folder


def of(folder: Path, **how: Any) -> str:
    return fingerprint(folder, **{"dtype": "bfloat16", **how})


def append(name: str) -> Callable[[Path], object]:
    def change(folder: Path) -> None:
        with (folder / name).open("ab") as file:
            file.write(b" ")

    return change


def flip(path: Path, place: int) -> None:
    data = bytearray(path.read_bytes())
    data[place] ^= 1
    path.write_bytes(data)


def shift_weights(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    save_file(
        {n: t + np.asarray(1, t.dtype) for n, t in tensors.items()}, folder / "model.safetensors"
    )


def rename_a_tensor(folder: Path) -> None:
    path = folder / "model.safetensors"
    data = path.read_bytes()
    path.write_bytes(data.replace(b"language_model", b"language_podel", 1))


CHANGES: dict[str, Callable[[Path], object]] = {
    "config": append("config.json"),
    "generation config": append("generation_config.json"),
    "processor": append("processor_config.json"),
    "tokenizer": append("tokenizer.json"),
    "tokenizer config": append("tokenizer_config.json"),
    "a file less": lambda folder: (folder / "generation_config.json").unlink(),
    "a longer weight file": append("model.safetensors"),
    "the last weight": lambda folder: flip(folder / "model.safetensors", -1),
    "a tensor's name": rename_a_tensor,
    "other weights of the same shapes": shift_weights,
    "in shards": sharded,
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES.keys())
def test_it_differs_for_other_content(change: Callable[[Path], object], folder: Path) -> None:
    before = of(folder)
    assert re.fullmatch("[0-9a-f]{16}", before)
    change(folder)
    assert of(folder) != before


def test_it_is_equal_for_equal_content(folder: Path) -> None:
    os.utime(folder / "config.json", (0, 0))
    (folder / "train.log").unlink()
    (folder / "README.md").write_text("A note of one node's")
    assert of(folder) == of(DEMO_FOLDER)


def test_it_differs_by_how_the_model_is_served(monkeypatch: pytest.MonkeyPatch) -> None:
    before = of(DEMO_FOLDER)
    others = [
        of(DEMO_FOLDER, dtype="float32"),
        of(DEMO_FOLDER, quantize=("fp8", None)),
        of(DEMO_FOLDER, quantize=(None, "int8")),
    ]
    monkeypatch.setattr(module, "PREPROCESSING_VERSION", module.PREPROCESSING_VERSION + 1)
    assert len({before, *others, of(DEMO_FOLDER)}) == 5


def test_every_shard_counts_and_no_file_beside_them(folder: Path) -> None:
    before = of(sharded(folder))
    (folder / "left-over.safetensors").write_bytes(b"x")
    assert of(folder) == before
    for shard in ("model-1.safetensors", "model-2.safetensors"):
        flip(folder / shard, -1)
        changed = of(folder)
        assert changed != before
        before = changed


def test_bin_files_count(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    before = of(folder)
    flip(folder / "pytorch_model.bin", -1)
    assert of(folder) != before


def bytes_read() -> int:
    """By this process so far."""
    lines = Path("/proc/self/io").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("rchar"))


def test_a_large_checkpoint_is_sampled_at_even_distances(folder: Path) -> None:
    size, header = 15 << 30, b'{"a":{"dtype":"U8","shape":[1],"data_offsets":[0,1]}}'
    path = folder / "model.safetensors"
    path.write_bytes(struct.pack("<Q", len(header)) + header)
    os.truncate(path, size)  # 15 GB of zeros, which take no room
    settings = sum(file.stat().st_size for file in folder.glob("*.json"))

    start = bytes_read()
    seen = [of(folder)]
    assert bytes_read() - start < settings + 2 * PAGES * PAGE_BYTES

    for share in (1 / PAGES, 1 / 2, 1):
        with path.open("r+b") as file:
            file.seek(int((size - PAGE_BYTES) * share) + PAGE_BYTES // 2)
            file.write(b"\1")
        seen.append(of(folder))
    assert len({*seen}) == 4


@pytest.mark.parametrize(
    "break_it",
    [
        lambda folder: (folder / "model.safetensors").unlink(),
        lambda folder: (sharded(folder) / "model-1.safetensors").unlink(),
        lambda folder: (folder / "model.safetensors.index.json").write_text("{"),
        lambda folder: (folder / "model.safetensors.index.json").write_text("{}"),
    ],
    ids=["no weights", "no shard", "a bad index", "an empty index"],
)
def test_a_checkpoint_that_cannot_be_read_is_an_error(
    break_it: Callable[[Path], object], folder: Path
) -> None:
    break_it(folder)
    with pytest.raises(StartupError, match=re.escape(str(folder))):
        of(folder)
