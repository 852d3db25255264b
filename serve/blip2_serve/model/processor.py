"""Turns image files into the pixels that a checkpoint expects. Imports no torch.

Resizes what `pictures` decodes. Pixels stay uint8, and the encoder rescales and normalises them on
its device: that is a quarter of the bytes to send, and exact, since Pillow resizes to whole numbers
anyway.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from blip2_serve.errors import StartupError
from blip2_serve.model import pictures
from blip2_serve.model.pictures.faults import out_of_memory

# Part of every image's digest. Increase it with any change to the resulting pixels.
PREPROCESSING_VERSION = 2


@dataclass(frozen=True)
class ImageProcessor:
    """Does what transformers' `BlipImageProcessor` does with the same config.

    Args:
        size: (height, width) in pixels of every result.
        mean, std: Per channel, for the encoder to normalise with.
        rescale: What the encoder multiplies pixels by first, usually 1/255.
        resample: Pillow's filter for resizing.
    """

    size: tuple[int, int]
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    rescale: float
    resample: Image.Resampling

    @classmethod
    def load(cls, folder: Path) -> ImageProcessor:
        """Reads processor_config.json or, for older checkpoints, preprocessor_config.json.

        Raises:
            StartupError: Neither exists, or it has steps other than resize, rescale and normalise.
        """
        config = _read_config(folder)
        for step, required in (
            ("do_resize", True),
            ("do_rescale", True),
            ("do_normalize", True),
            ("do_center_crop", False),
        ):
            if config.get(step, required) != required:
                raise StartupError(
                    f"{folder}: image processors with {step}={not required} are not supported"
                )
        size = config.get("size", 384)  # defaults are BlipImageProcessor's
        if isinstance(size, int):
            size = {"height": size, "width": size}
        if not {"height", "width"} <= size.keys():
            raise StartupError(f"{folder}: the image size must have height and width, not {size}")
        return cls(
            size=(size["height"], size["width"]),
            mean=tuple(config.get("image_mean", (0.48145466, 0.4578275, 0.40821073))),
            std=tuple(config.get("image_std", (0.26862954, 0.26130258, 0.27577711))),
            rescale=config.get("rescale_factor", 1 / 255),
            resample=Image.Resampling(config.get("resample", Image.Resampling.BICUBIC)),
        )

    def pixels(self, data: bytes) -> NDArray[np.uint8]:
        """Returns an image file's pixels: upright RGB, uint8 [3, height, width].

        Raises:
            InvalidImage: The file is broken, of an unsupported format, has too many pixels, or
                takes more memory than this process may have.
        """
        try:
            image = pictures.decode(data, self.size[::-1]).resize(self.size[::-1], self.resample)
            return np.ascontiguousarray(np.asarray(image).transpose(2, 0, 1))
        except MemoryError as error:
            raise out_of_memory() from error


def _read_config(folder: Path) -> dict[str, Any]:
    for name, key in (
        ("processor_config.json", "image_processor"),
        ("preprocessor_config.json", None),
    ):
        try:
            config = json.loads((folder / name).read_text())
        except FileNotFoundError:
            continue
        except (OSError, ValueError) as error:
            raise StartupError(f"cannot read {folder / name}: {error}") from None
        if key is None:
            return dict(config)
        if key in config:
            return dict(config[key])
    raise StartupError(
        f"{folder} has no image processor, neither in processor_config.json nor in "
        "preprocessor_config.json"
    )
