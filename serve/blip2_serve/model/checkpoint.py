"""Opens checkpoints and loads their tensors.

Files are memory-mapped and copied tensor by tensor into memory that the caller has allocated, cast
to its dtype. A stage's memory therefore grows by its own tensors only, whatever the checkpoint's
dtype and sharding. This module does not know which stage needs which tensors.
"""

from __future__ import annotations

import json
import logging
import re
import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import safe_open
from torch import Tensor, nn
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
        """Copies the tensor of each name into its destination and casts it to that dtype.

        Progress is logged every few seconds, with `what` as the name of the whole.

        Raises:
            StartupError: A tensor is missing, has another shape or values that are not finite, or
                the checkpoint has more layers than its config says.
        """
        missing = [name for name in destinations if name not in self.files]
        if missing:
            raise StartupError(
                f"{self.folder} lacks {len(missing)} tensors of the {what}, the first being "
                f"{missing[0]}: the checkpoint is incomplete or not a BLIP-2 OPT model"
            )
        self._refuse_more_layers(destinations)
        progress = _Progress(what, sum(t.numel() * t.element_size() for t in destinations.values()))
        for path in sorted({self.files[name] for name in destinations}):
            with _open(path) as tensors:
                for name, destination in destinations.items():
                    if self.files[name] != path:
                        continue
                    source = tensors[name]
                    if source.shape != destination.shape:
                        raise StartupError(
                            f"{self.folder}: {name} has shape {list(source.shape)}, but the config "
                            f"says {list(destination.shape)}"
                        )
                    destination.copy_(source)
                    if not _is_finite(destination):
                        kind = str(destination.dtype).removeprefix("torch.")
                        raise StartupError(
                            f"{self.folder}: {name} has values that are not finite in {kind}: the "
                            "checkpoint is damaged, or needs another --dtype"
                        )
                    progress.add(destination.numel() * destination.element_size())

    def _refuse_more_layers(self, destinations: Mapping[str, Tensor]) -> None:
        """A part of the model must not be left out in silence. Other tensors may be buffers."""
        parts = {_without_numbers(name) for name in destinations}
        for name in self.files:
            if name not in destinations and _without_numbers(name) in parts:
                raise StartupError(
                    f"{self.folder} has {name}, which its config has no place for: they do not "
                    "belong together"
                )


def _without_numbers(name: str) -> str:
    return re.sub(r"\.\d+\.", ".#.", name)


def _is_finite(tensor: Tensor) -> bool:
    lowest, highest = torch.aminmax(tensor)  # NaN if there is one
    return bool(torch.isfinite(lowest) & torch.isfinite(highest))


def open_checkpoint(model: str, revision: str | None = None) -> Checkpoint:
    """Opens a folder, the shipped checkpoint ("demo") or a hub id, downloading it if needed.

    Raises:
        StartupError: There is no such checkpoint, or it is not a BLIP-2 OPT model.
    """
    folder = find_folder(model, revision)
    return Checkpoint(folder, read_config(folder), _tensor_files(folder))


def read_config(folder: Path) -> Blip2Config:
    """Reads the config of a checkpoint folder and checks that this package can serve it.

    Raises:
        StartupError: There is no readable config, or it describes an unsupported model.
    """
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
            f"{folder} is a BLIP-2 {text.model_type} checkpoint; only OPT decoders are supported"
        )
    if text.word_embed_proj_dim != text.hidden_size:
        raise StartupError(
            f"{folder}: word_embed_proj_dim ({text.word_embed_proj_dim}) differs from hidden_size "
            f"({text.hidden_size}), which is not supported"
        )
    if config.image_token_index is None:
        raise StartupError(
            f"{folder}: config.json has no image_token_index; use a newer revision of the model"
        )
    return config


def resolve_dtype(dtype: str, device: torch.device, config: Blip2Config) -> torch.dtype:
    """Returns the dtype to compute in.

    "auto" means float32 on a CPU and the checkpoint's own dtype on a GPU, or bfloat16 if that is
    float32.
    """
    if dtype != "auto":
        return _DTYPES[dtype]
    if device.type == "cpu":
        return torch.float32
    stored: torch.dtype | None = config.dtype
    return stored if stored in (torch.float16, torch.bfloat16) else torch.bfloat16


def allocate(module: nn.Module, device: torch.device) -> None:
    """Gives the parameters of a module on the meta device memory, with whatever is in it.

    `to_empty` imports a compiler for that.
    """
    for part in module.modules():
        for name, parameter in part.named_parameters(recurse=False):
            memory = torch.empty(parameter.shape, dtype=parameter.dtype, device=device)
            setattr(part, name, nn.Parameter(memory, requires_grad=False))


def tensor_bytes(module: nn.Module) -> int:
    """Returns the bytes of a module's parameters; a shared parameter counts once."""
    return sum(p.numel() * p.element_size() for p in module.parameters())


def eos_token_ids(config: Blip2Config) -> tuple[int, ...]:
    """Returns the token ids that end an answer; there may be none.

    They come from the text config: transformers generates through the language model and ignores
    the outer config too.
    """
    eos = config.text_config.eos_token_id
    if eos is None:
        return ()
    return (eos,) if isinstance(eos, int) else tuple(eos)


def longest_sequence(config: Blip2Config, max_model_len: int | None) -> int:
    """Returns the most tokens of image, prompt and answer together.

    This is `max_model_len`, or the model's number of positions if that is None.

    Raises:
        StartupError: `max_model_len` exceeds the model's positions or leaves no room for an image.
    """
    positions: int = config.text_config.max_position_embeddings
    shortest = shortest_sequence(config)
    if max_model_len is not None and not shortest <= max_model_len <= positions:
        raise StartupError(
            f"max_model_len must be {shortest} to {positions} for this model, not {max_model_len}"
        )
    return max_model_len or positions


def shortest_sequence(config: Blip2Config) -> int:
    """Returns the tokens of the shortest request: the image, BOS and one token of an answer."""
    return int(config.num_query_tokens) + 2


def _tensor_files(folder: Path) -> dict[str, Path]:
    for single, index in WEIGHT_LAYOUTS:
        if (folder / index).exists():
            weight_map = _weight_map(folder / index)
            absent = sorted({n for n in weight_map.values() if not (folder / n).exists()})
            if absent:
                raise StartupError(f"{folder}: {index} lists {absent[0]}, which does not exist")
            return {name: folder / file for name, file in weight_map.items()}
        if (folder / single).exists():
            with _open(folder / single) as tensors:
                return dict.fromkeys(tensors, folder / single)
    raise StartupError(
        f"{folder} has no weights: neither {WEIGHT_LAYOUTS[0][0]} nor {WEIGHT_LAYOUTS[1][0]}"
    )


def _weight_map(index: Path) -> dict[str, str]:
    """The names of the files that an index lists for each tensor."""
    try:
        found: dict[str, str] = json.loads(index.read_text())["weight_map"]
        # Nothing outside of the checkpoint's folder.
        if all(name == Path(name).name not in ("", "..") for name in found.values()):
            return found
    except (OSError, ValueError, LookupError, TypeError, AttributeError):
        pass
    raise StartupError(f"{index} does not list the files of a checkpoint: it is damaged")


class _Tensors(Protocol):
    def __getitem__(self, name: str) -> Tensor: ...
    def __iter__(self) -> Iterator[str]: ...


@contextmanager
def _open(path: Path) -> Iterator[_Tensors]:
    """Opens a file of tensors. Those of torch's own format may hold nothing else: it could run.

    Raises:
        StartupError: the file cannot be read.
    """
    with ExitStack() as opened:
        try:
            tensors: _Tensors
            if path.suffix == ".safetensors":
                tensors = _Safetensors(opened.enter_context(safe_open(path, framework="pt")))
            else:
                tensors = torch.load(path, map_location="cpu", mmap=True, weights_only=True)
        except Exception as error:  # each format has errors of its own
            raise StartupError(f"cannot read {path}: {error}") from error
        yield tensors


class _Safetensors:
    def __init__(self, file: Any) -> None:
        self._file = file

    def __getitem__(self, name: str) -> Tensor:
        tensor: Tensor = self._file.get_tensor(name)
        return tensor

    def __iter__(self) -> Iterator[str]:
        return iter(self._file.keys())


class _Progress:
    """Logs a line every few seconds while a large checkpoint loads."""

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
