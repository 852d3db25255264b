"""Turns image files into the pixels that a checkpoint expects. Imports no torch.

Decodes, applies the EXIF orientation, converts to RGB and resizes. Pixels stay uint8, and the
encoder rescales and normalises them on its device: that is a quarter of the bytes to send, and
exact, since Pillow resizes to whole numbers anyway.
"""

from __future__ import annotations

import io
import json
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps, UnidentifiedImageError

from blip2_serve.errors import InvalidImage, StartupError

FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "TIFF", "GIF")
MAX_PIXELS = 64_000_000

# A JPEG may be decoded at 1/2, 1/4 or 1/8 of its size as long as each side still has this many
# times the pixels of the result. Compared with full decoding, a photograph's pixels then differ by
# at most half a grey level (of 255) on average and by at most 20 at the sharpest edges.
DRAFT_OVERSAMPLING = 4
DRAFT_MEAN_TOLERANCE, DRAFT_TOLERANCE = 0.5, 20

Image.init()  # registers every format: Image.open(formats=...) only knows registered ones

# Pillow warns about odd EXIF data and large images, which this module checks itself. The filter is
# set once per process because `warnings.catch_warnings` is not thread-safe.
warnings.filterwarnings("ignore", module=r"PIL\.")

# Part of every image's digest. Increase it with any change to the resulting pixels.
PREPROCESSING_VERSION = 1


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
            InvalidImage: The file is broken, of an unsupported format, or has too many pixels.
        """
        image = self._decode(data).resize(self.size[::-1], self.resample)
        return np.ascontiguousarray(np.asarray(image).transpose(2, 0, 1))

    def _decode(self, data: bytes) -> Image.Image:
        try:
            image = Image.open(io.BytesIO(data), formats=FORMATS)
            if image.width * image.height > MAX_PIXELS:
                raise InvalidImage(
                    f"the image has {image.width} x {image.height} pixels; the maximum is "
                    f"{MAX_PIXELS:,} pixels",
                    kind="pixels",
                )
            if image.format == "JPEG" and image.mode in ("RGB", "L"):
                height, width = self.size
                image.draft(None, (DRAFT_OVERSAMPLING * width, DRAFT_OVERSAMPLING * height))
            image.load()
            return _to_rgb(ImageOps.exif_transpose(image))
        except InvalidImage:
            raise
        except Image.DecompressionBombError as error:
            raise InvalidImage(f"the image is too large: {error}", kind="pixels") from error
        except UnidentifiedImageError:
            accepted = ", ".join(FORMATS)
            raise InvalidImage(
                f"not an image in a supported format ({accepted})", kind="format"
            ) from None
        # Pillow's decoders leak the errors of their parsers (SyntaxError, struct.error, IndexError,
        # zlib.error, ...). Each of them means that the file is broken.
        except Exception as error:
            raise InvalidImage(f"the image is broken or truncated: {error}") from error


def _to_rgb(image: Image.Image) -> Image.Image:
    """Converts any mode to RGB: composites alpha over white and scales 16 bits to 8."""
    if image.mode == "RGB" and "transparency" not in image.info:
        return image
    if image.mode == "I" or image.mode.startswith("I;16"):
        # Scaled here, as Pillow's convert would clip at 255. 65535 / 257 = 255.
        wide = np.asarray(image).astype(np.uint32).clip(0, 65535)
        return Image.fromarray(((wide + 128) // 257).astype(np.uint8)).convert("RGB")
    if image.mode == "F":
        raise InvalidImage(
            "floating-point images are not supported; send 8 or 16 bits per channel",
            kind="format",
        )
    if image.mode in ("RGBA", "LA", "PA", "RGBa", "La") or "transparency" in image.info:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, "white")
        image = Image.alpha_composite(white, image)
    return image.convert("RGB")


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
