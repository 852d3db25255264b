"""Broken files give pixels or an error of ours, and no line on stderr or in logs."""

from __future__ import annotations

import logging
from pathlib import Path

import numpy as np
import pytest

from blip2_serve.errors import InvalidImage
from blip2_serve.model.processor import ImageProcessor
from blip2_serve.model.source import DEMO_FOLDER
from support.mutations import mutated, seeds

FILES = {"short": 10_000, "long": 200_000}  # by profile, as tests/conftest.py has them
FORMATS = ("JPEG", "PNG", "WEBP", "AVIF", "HEIF", "GIF", "BMP", "TIFF")
SIDE = 32

# An image of the most pixels takes 160 MB, and once more while it is made RGB.
MEMORY_KB = 500_000
PROCESS = Path("/proc/self")


def processor() -> ImageProcessor:
    loaded = ImageProcessor.load(DEMO_FOLDER)
    return ImageProcessor((SIDE, SIDE), loaded.mean, loaded.std, loaded.rescale, loaded.resample)


def memory_kb(name: str) -> int:
    """VmRSS, this process's memory, or VmHWM, its peak, which other tests may have set."""
    lines = (PROCESS / "status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith(f"{name}:")).split()[1])


def test_the_intact_files_are_accepted() -> None:
    own = processor()
    assert [*seeds()] == [*FORMATS]
    for files in seeds().values():
        for data in files:
            assert own.pixels(data).shape == (3, SIDE, SIDE)


@pytest.mark.long
@pytest.mark.parametrize("name", FORMATS)
def test_broken_files_give_pixels_or_an_error_of_ours(
    name: str,
    pytestconfig: pytest.Config,
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
) -> None:
    profile = pytestconfig.getoption("--hypothesis-profile")
    own = processor()
    seeds()
    capfd.readouterr()
    (PROCESS / "clear_refs").write_text("5")  # the peak is now
    before_kb = memory_kb("VmRSS")
    accepted = 0
    # A crash of the interpreter leaves this file behind.
    saved = tmp_path / f"broken.{name.lower()}"
    with caplog.at_level(logging.WARNING):
        for seed in range(FILES.get(profile, FILES["long"]) // len(FORMATS)):
            data = mutated(name, seed)
            saved.write_bytes(data)
            try:
                pixels = own.pixels(data)
                accepted += 1
                assert pixels.shape == (3, SIDE, SIDE)
                assert pixels.dtype == np.uint8
            except InvalidImage:
                pass
            except BaseException as error:
                pytest.fail(f"mutated({name!r}, {seed}), saved as {saved}: {error!r}")
            # `decode` logs what it did not foresee.
            assert not caplog.records, f"mutated({name!r}, {seed}), saved as {saved}"
    assert accepted
    assert capfd.readouterr().err == ""
    assert memory_kb("VmHWM") - before_kb < MEMORY_KB
