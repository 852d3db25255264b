"""Samples of any width and sign to 8 bits, by the rules of docs/api.md."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from blip2_serve.model.pictures.colours import Pixels

_UNSIGNED, _SIGNED, _FLOAT = 1, 2, 3
_KINDS = {_UNSIGNED: "u", _SIGNED: "i", _FLOAT: "f"}
_WHOLE = (8, 16, 32, 64)
_HORIZONTAL, _FLOATING_POINT = 2, 3  # predictors
_CMYK = 4

Samples = NDArray[Any]


@dataclass(frozen=True)
class Layout:
    """How a picture's samples lie in its bytes, and what they mean.

    Args:
        order: "<" or ">": little or big-endian.
        format: 1 unsigned, 2 signed, 3 floating point.
        samples: Per pixel; the first `colours` of them are grey, RGB or CMYK.
        alpha: "premultiplied", "straight", or "" for none; it is the sample after the colours.
        planar: Each sample has a plane of its own.
        predictor: 1 none, 2 differences of samples, 3 differences of floats' bytes.
        tile_width: 0 for strips. Predictors start anew with each tile.
        least, most: What black and white are, for all samples or each; empty if the file says none.
    """

    order: str
    width: int
    height: int
    bits: int
    format: int
    samples: int
    colours: int
    white_is_zero: bool
    alpha: str
    planar: bool
    predictor: int
    tile_width: int
    least: tuple[float, ...]
    most: tuple[float, ...]

    @property
    def is_usual(self) -> bool:
        """Whether Pillow is likely to have a mode for it."""
        inverted = self.white_is_zero and self.samples > 1
        return self.format == _UNSIGNED and self.bits in (1, 2, 4, 8) and not inverted

    @property
    def is_known(self) -> bool:
        if self.format == _FLOAT:
            bits: tuple[int, ...] | range = (16, 32, 64)
        else:
            bits = (*range(1, 33), 64)
        predicted = {1: True, _HORIZONTAL: self.bits in _WHOLE, _FLOATING_POINT: self.format == 3}
        return (
            self.format in _KINDS
            and self.bits in bits
            and predicted.get(self.predictor, False)
            and self.tile_width * self.bits * self._in_a_plane % 8 == 0
        )

    @property
    def planes(self) -> int:
        return self.samples if self.planar else 1

    @property
    def _in_a_plane(self) -> int:
        return 1 if self.planar else self.samples

    @property
    def _stored_width(self) -> int:
        """With the whole of the last tile."""
        return (
            -(-self.width // self.tile_width) * self.tile_width if self.tile_width else self.width
        )

    @property
    def row_bytes(self) -> int:
        """Of one row of one plane."""
        return self.bytes_of(self._stored_width)

    def bytes_of(self, pixels: int) -> int:
        return (pixels * self._in_a_plane * self.bits + 7) // 8

    def to_8_bits(self, *planes: Pixels) -> Pixels:
        """Converts rows of bytes, uint8 [rows, row_bytes] for each plane.

        Returns:
            Grey as uint8 [rows, width], RGB as [rows, width, 3], with a straight alpha channel
            as [rows, width, 2 or 4].
        """
        values = np.concatenate([self._samples(plane) for plane in planes], axis=-1)
        values = values[:, : self.width]
        colours = np.stack([self._scale(values[..., i], i) for i in range(self.colours)], axis=-1)
        if self.colours == _CMYK:
            colours = _cmyk_to_rgb(colours)
        if self.alpha:
            alpha = self._scale(values[..., self.colours], self.colours)[..., None]
            if self.alpha == "straight":
                return np.concatenate((colours, alpha), axis=-1)
            colours = np.minimum(colours.astype(np.uint16) + (255 - alpha), 255).astype(np.uint8)
        return colours[..., 0] if colours.shape[-1] == 1 else colours

    def _samples(self, data: Pixels) -> Samples:
        """The numbers of one plane: [rows, stored width, samples in a plane]."""
        shape = len(data), self._stored_width, self._in_a_plane
        if self.bits not in _WHOLE:
            return self._unpack(data, shape[1] * shape[2]).reshape(shape)
        size = self.bits // 8
        kind = np.dtype(f"{self.order}{_KINDS[self.format]}{size}")
        tile = self.tile_width or shape[1]
        tiles = len(data), shape[1] // tile, tile, self._in_a_plane
        if self.predictor == _HORIZONTAL:
            differences = data.view(f"{self.order}u{size}").reshape(tiles)
            sums = np.cumsum(differences, axis=2, dtype=f"=u{size}")
            return sums.view(kind.newbyteorder("=")).reshape(shape)
        if self.predictor == _FLOATING_POINT:
            stride = self._in_a_plane
            sums = np.cumsum(data.reshape(len(data), tiles[1], -1, stride), axis=2, dtype=np.uint8)
            by_byte = sums.reshape(len(data), tiles[1], size, tile * stride)
            whole = np.ascontiguousarray(np.moveaxis(by_byte, 2, -1))
            return whole.view(f">f{size}").reshape(shape)
        return data.view(kind).reshape(shape)

    def _unpack(self, data: Pixels, count: int) -> Samples:
        """Integers that end within bytes, or have three of them."""
        if self.bits == 24:
            whole = data[:, : 3 * count].reshape(len(data), count, 3).astype(np.int64)
            weights = np.array([1, 1 << 8, 1 << 16])[:: 1 if self.order == "<" else -1]
            values: Samples = whole @ weights
        else:
            unpacked = np.unpackbits(data, axis=1)[:, : count * self.bits]
            weights = 1 << np.arange(self.bits - 1, -1, -1, dtype=np.int64)
            values = unpacked.reshape(len(data), count, self.bits) @ weights
        if self.format == _SIGNED:
            values -= (values >> self.bits - 1) << self.bits
        return values

    def _scale(self, values: Samples, sample: int) -> Pixels:
        """Of samples of one kind, those from black to white to 0 to 255. NaN is black."""
        black, white = self._range(sample)
        with np.errstate(all="ignore"):
            shares = (values.astype(np.float64) - black) / (white - black)
            if self.white_is_zero and sample < self.colours:
                shares = 1 - shares
            grey: Pixels = np.rint(np.nan_to_num(shares.clip(0, 1)) * 255).astype(np.uint8)
            return grey

    def _range(self, sample: int) -> tuple[float, float]:
        if self.format == _FLOAT or self.bits > 16:
            given = [
                limits[sample] if sample < len(limits) else limits[0]
                for limits in (self.least, self.most)
                if limits and (sample < self.colours or sample < len(limits))
            ]
            if len(given) == 2 and np.isfinite(given).all() and given[0] < given[1]:
                return given[0], given[1]
        if self.format == _FLOAT:
            return 0, 1
        return 0, 2 ** (self.bits - (self.format == _SIGNED)) - 1


def _cmyk_to_rgb(inks: Pixels) -> Pixels:
    height, width, _ = inks.shape
    image = Image.frombytes("CMYK", (width, height), np.ascontiguousarray(inks).tobytes())
    return np.asarray(image.convert("RGB"))
