"""Says in 16 digits whether two nodes serve the same model. Imports no torch.

Weights are sampled, so this takes well under a second for any size: it tells other revisions,
formats, precisions and settings apart, and files that are cut off or still being written. It does
not prove that all weights are equal: a change of a few of them, between the samples, goes unseen.
"""

from __future__ import annotations

import hashlib
import json
import struct
from collections.abc import Iterator
from pathlib import Path

from blip2_serve.errors import StartupError
from blip2_serve.model.processor import PREPROCESSING_VERSION
from blip2_serve.model.source import WEIGHT_LAYOUTS

# Of all weight files together, at even distances; in each file at least one.
PAGES, PAGE_BYTES = 64, 4096

# What is read beside the weights. Logs, readmes and the like may differ.
_SETTINGS = (
    "config.json",
    "generation_config.json",
    "processor_config.json",
    "preprocessor_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
)

_LARGEST_HEADER = 100 << 20  # as the safetensors library has it

Part = tuple[str, bytes]


def fingerprint(folder: Path, *, dtype: str, quantize: tuple[str | None, ...] = ()) -> str:
    """Returns 16 hexadecimal digits, equal wherever the same model is served in the same way.

    Args:
        folder: The checkpoint. Its path does not count, nor do its files' dates.
        dtype: What is computed in.
        quantize: How each stage's weights are quantised, in a fixed order.

    Raises:
        StartupError: A file is missing or cannot be read.
    """
    digest = hashlib.sha256()
    served = f"{PREPROCESSING_VERSION} {dtype} {quantize}".encode()
    try:
        for name, content in (("", served), *_settings(folder), *_weights(folder)):
            # Lengths keep the parts apart.
            digest.update(struct.pack("<2Q", len(name.encode()), len(content)))
            digest.update(name.encode())
            digest.update(content)
    except (OSError, ValueError, KeyError) as error:
        raise StartupError(f"cannot read the checkpoint in {folder}: {error}") from error
    return digest.hexdigest()[:16]


def _settings(folder: Path) -> Iterator[Part]:
    for name in _SETTINGS:
        if (folder / name).exists():
            yield name, (folder / name).read_bytes()


def _weights(folder: Path) -> Iterator[Part]:
    """Of each file its size, its header if it is of safetensors, and pages of its data.

    Raises:
        StartupError: There are none.
    """
    files = _weight_files(folder)
    sizes = [path.stat().st_size for path in files]
    for path, size in zip(files, sizes, strict=True):
        yield path.name, struct.pack("<Q", size)
        with path.open("rb") as file:
            start = 0
            if path.suffix == ".safetensors":
                (length,) = struct.unpack("<Q", file.read(8).ljust(8, b"\0"))
                yield "header", file.read(min(length, _LARGEST_HEADER))
                start = file.tell()
            pages = max(1, PAGES * size // max(1, sum(sizes)))
            for page in range(pages):
                # The last page ends with the file, or begins with the data.
                file.seek(start + max(0, size - start - PAGE_BYTES) * (page + 1) // pages)
                yield "page", file.read(PAGE_BYTES)


def _weight_files(folder: Path) -> list[Path]:
    """Those that `checkpoint.py` loads."""
    for single, index in WEIGHT_LAYOUTS:
        if (folder / index).exists():
            names = set(json.loads((folder / index).read_text())["weight_map"].values())
            return [folder / name for name in sorted(names)]
        if (folder / single).exists():
            return [folder / single]
    raise StartupError(f"{folder} has no weights: neither *.safetensors nor *.bin")
