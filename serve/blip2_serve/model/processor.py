"""Image bytes to the pixels a checkpoint expects: decode, upright, RGB, resize. Imports no torch.

The result is uint8 before rescaling and normalisation, which the encoder does on its device: a
quarter of the bytes to send, and nothing lost, since resizing yields whole numbers anyway.
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

# A JPEG may be decoded at 1/2, 1/4 or 1/8 of its size while that leaves at least this many decoded
# pixels for each one wanted along both sides. Against decoding in full, a photograph's pixels then
# differ by at most half a grey level (of 255) on average, and at the sharpest edges by at most 20.
DRAFT_OVERSAMPLING = 4
DRAFT_MEAN_TOLERANCE, DRAFT_TOLERANCE = 0.5, 20

Image.init()  # or Image.open does not know all of FORMATS by name

# Pillow warns of odd EXIF data and large images: no news, since what counts is checked. Once for
# the process: with `warnings.catch_warnings`, one thread would put back the filters of another.
warnings.filterwarnings("ignore", module=r"PIL\.")

# Part of every image's digest: raise it when the pixels of an image change.
PREPROCESSING_VERSION = 1


@dataclass(frozen=True)
class ImageProcessor:
    """What `BlipImageProcessor` does, as its config says; `size` is (height, width)."""

    size: tuple[int, int]
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    rescale: float
    resample: Image.Resampling

    @classmethod
    def load(cls, folder: Path) -> ImageProcessor:
        """Reads processor_config.json or, as older checkpoints have it, preprocessor_config.json.

        Raises:
            StartupError: neither is there, or it asks for steps other than resize and normalise.
        """
        config = _read_config(folder)
        for step, wanted in (
            ("do_resize", True),
            ("do_rescale", True),
            ("do_normalize", True),
            ("do_center_crop", False),
        ):
            if config.get(step, wanted) != wanted:
                raise StartupError(
                    f"{folder}: image processors with {step}={not wanted} are not served"
                )
        size = config.get("size", 384)  # defaults are BlipImageProcessor's
        if isinstance(size, int):
            size = {"height": size, "width": size}
        if not {"height", "width"} <= size.keys():
            raise StartupError(f"{folder}: image size {size} has no height and width")
        return cls(
            size=(size["height"], size["width"]),
            mean=tuple(config.get("image_mean", (0.48145466, 0.4578275, 0.40821073))),
            std=tuple(config.get("image_std", (0.26862954, 0.26130258, 0.27577711))),
            rescale=config.get("rescale_factor", 1 / 255),
            resample=Image.Resampling(config.get("resample", Image.Resampling.BICUBIC)),
        )

    def pixels(self, data: bytes) -> NDArray[np.uint8]:
        """An image file's bytes -> uint8 [3, height, width], upright RGB.

        Raises:
            InvalidImage: not a readable image of an accepted format, or one too large.
        """
        image = self._decode(data).resize(self.size[::-1], self.resample)
        return np.ascontiguousarray(np.asarray(image).transpose(2, 0, 1))

    def _decode(self, data: bytes) -> Image.Image:
        try:
            image = Image.open(io.BytesIO(data), formats=FORMATS)
            if image.width * image.height > MAX_PIXELS:
                raise InvalidImage(
                    f"the image has {image.width} x {image.height} pixels; at most "
                    f"{MAX_PIXELS:,} are accepted",
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
                f"not an image that can be read; accepted are {accepted}", kind="format"
            ) from None
        # Pillow's decoders raise whatever their parsing trips over (SyntaxError, struct.error,
        # IndexError, zlib.error, ...): each of them means that the file is broken.
        except Exception as error:
            raise InvalidImage(f"the image is broken or truncated: {error}") from error


def _to_rgb(image: Image.Image) -> Image.Image:
    """Any mode to RGB: alpha over white, 16 bits to 8."""
    if image.mode == "RGB" and "transparency" not in image.info:
        return image
    if image.mode == "I" or image.mode.startswith("I;16"):
        # Pillow's convert would clip at 255; 65535 / 257 = 255.
        wide = np.asarray(image).astype(np.uint32).clip(0, 65535)
        return Image.fromarray(((wide + 128) // 257).astype(np.uint8)).convert("RGB")
    if image.mode == "F":
        raise InvalidImage(
            "images of floating-point values have no defined white; send 8 or 16 bits",
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
        f"{folder} has no image processor: neither processor_config.json nor "
        "preprocessor_config.json says how to resize"
    )
