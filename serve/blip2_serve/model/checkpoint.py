"""From a folder or a hub id to tensors, each read once and cast on its way to where it belongs.

Files are memory-mapped and copied tensor by tensor into memory that the caller has allocated in
the dtype asked for, so a stage's own memory grows by its own tensors and by nothing else, whatever
the checkpoint's dtype and sharding. This module does not know which stage wants which tensors.
"""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import safe_open
from torch import Tensor
from transformers import Blip2Config

from blip2_serve.errors import StartupError
from blip2_serve.model.source import WEIGHT_LAYOUTS, find_folder

logger = logging.getLogger(__name__)

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True)
class Checkpoint:
    """An opened BLIP-2 OPT checkpoint: its config, and which file holds which tensor."""

    folder: Path
    config: Blip2Config
    files: Mapping[str, Path]

    def load(self, destinations: Mapping[str, Tensor], what: str) -> None:
        """Fills each destination from the tensor of its name, casting; logs progress as `what`.

        Raises:
            StartupError: a tensor is missing or has another shape.
        """
        missing = [name for name in destinations if name not in self.files]
        if missing:
            raise StartupError(
                f"{self.folder}: {len(missing)} tensors of the {what} are missing, first "
                f"{missing[0]}: the checkpoint is incomplete or not a BLIP-2 OPT model"
            )
        progress = _Progress(what, sum(t.numel() * t.element_size() for t in destinations.values()))
        for path in sorted({self.files[name] for name in destinations}):
            with _open(path) as tensors:
                for name, destination in destinations.items():
                    if self.files[name] != path:
                        continue
                    source = tensors[name]
                    if source.shape != destination.shape:
                        raise StartupError(
                            f"{self.folder}: {name} has shape {list(source.shape)}, its config "
                            f"says {list(destination.shape)}"
                        )
                    destination.copy_(source)
                    progress.add(destination.numel() * destination.element_size())


def open_checkpoint(model: str, revision: str | None = None) -> Checkpoint:
    """Opens a folder, the shipped checkpoint ("demo") or a hub id (downloaded if need be).

    Raises:
        StartupError: there is no such checkpoint, or it is not a BLIP-2 OPT model.
    """
    folder = find_folder(model, revision)
    return Checkpoint(folder, read_config(folder), _tensor_files(folder))


def read_config(folder: Path) -> Blip2Config:
    """The config of a checkpoint folder, checked to be one that this package can serve."""
    path = folder / "config.json"
    try:
        raw = json.loads(path.read_text())
    except FileNotFoundError:
        raise StartupError(f"{folder} is not a BLIP-2 checkpoint: it has no config.json") from None
    except (OSError, ValueError) as error:
        raise StartupError(f"cannot read {path}: {error}") from None
    kind = raw.get("model_type") if isinstance(raw, dict) else None
    if kind != "blip-2":
        raise StartupError(f"{folder} is not a BLIP-2 checkpoint: its model_type is {kind}")
    config = Blip2Config.from_dict(raw)
    text = config.text_config
    if text.model_type != "opt":
        raise StartupError(
            f"{folder} is a BLIP-2 {text.model_type} checkpoint: only OPT decoders are served"
        )
    if text.word_embed_proj_dim != text.hidden_size:
        raise StartupError(
            f"{folder}: OPT with embeddings of another width than its layers is not served"
        )
    if config.image_token_index is None:
        raise StartupError(
            f"{folder}: config.json lacks image_token_index; take a newer revision of it"
        )
    return config


def resolve_dtype(dtype: str, device: torch.device, config: Blip2Config) -> torch.dtype:
    """ "auto" is float32 on a CPU and, on a GPU, the checkpoint's dtype (bfloat16 for float32)."""
    if dtype != "auto":
        return _DTYPES[dtype]
    if device.type == "cpu":
        return torch.float32
    stored: torch.dtype | None = config.dtype
    return stored if stored in (torch.float16, torch.bfloat16) else torch.bfloat16


def tensor_bytes(module: torch.nn.Module) -> int:
    """Bytes of a module's parameters, each counted once."""
    return sum(p.numel() * p.element_size() for p in module.parameters())


def eos_token_ids(config: Blip2Config) -> tuple[int, ...]:
    """transformers generates through the language model, so only its config counts here."""
    eos = config.text_config.eos_token_id
    if eos is None:
        return ()
    return (eos,) if isinstance(eos, int) else tuple(eos)


def longest_sequence(config: Blip2Config, asked: int | None) -> int:
    """Tokens of image, prompt and answer together: the model's positions, or fewer if asked.

    Raises:
        StartupError: more are asked for than the model has, or too few for an image.
    """
    positions: int = config.text_config.max_position_embeddings
    shortest = shortest_sequence(config)
    if asked is not None and not shortest <= asked <= positions:
        raise StartupError(
            f"max_model_len {asked} is out of range: this model takes {shortest} to {positions}"
        )
    return asked or positions


def shortest_sequence(config: Blip2Config) -> int:
    """Tokens of the shortest request: the image, BOS and one token of an answer."""
    return int(config.num_query_tokens) + 2


def _tensor_files(folder: Path) -> dict[str, Path]:
    for single, index in WEIGHT_LAYOUTS:
        if (folder / index).exists():
            weight_map = json.loads((folder / index).read_text())["weight_map"]
            absent = sorted({n for n in weight_map.values() if not (folder / n).exists()})
            if absent:
                raise StartupError(f"{folder}: {index} names {absent[0]}, which is not there")
            return {name: folder / file for name, file in weight_map.items()}
        if (folder / single).exists():
            try:
                with _open(folder / single) as tensors:
                    return dict.fromkeys(tensors, folder / single)
            except Exception as error:
                raise StartupError(f"cannot read {folder / single}: {error}") from error
    raise StartupError(
        f"{folder} holds no weights: neither {WEIGHT_LAYOUTS[0][0]} nor {WEIGHT_LAYOUTS[1][0]}"
    )


class _Tensors(Protocol):
    def __getitem__(self, name: str) -> Tensor: ...
    def __iter__(self) -> Iterator[str]: ...


@contextmanager
def _open(path: Path) -> Iterator[_Tensors]:
    if path.suffix == ".safetensors":
        with safe_open(path, framework="pt") as file:
            yield _Safetensors(file)
    else:
        yield torch.load(path, map_location="cpu", mmap=True, weights_only=True)


class _Safetensors:
    def __init__(self, file: Any) -> None:
        self._file = file

    def __getitem__(self, name: str) -> Tensor:
        tensor: Tensor = self._file.get_tensor(name)
        return tensor

    def __iter__(self) -> Iterator[str]:
        return iter(self._file.keys())


class _Progress:
    """A log line every few seconds while a large checkpoint loads."""

    SECONDS = 2.0

    def __init__(self, what: str, total: int) -> None:
        self._what, self._total, self._done = what, total, 0
        self._last = time.monotonic()

    def add(self, size: int) -> None:
        self._done += size
        if time.monotonic() - self._last >= self.SECONDS:
            self._last = time.monotonic()
            logger.info(
                "loading %s: %.1f of %.1f GB", self._what, self._done / 1e9, self._total / 1e9
            )
