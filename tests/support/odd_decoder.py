"""A decoder process that misbehaves on demand: a file tells it how, after "do:".

Run it as `DecodePool(..., module=__name__)`. Files without "do:" are decoded as usual.
"""

from __future__ import annotations

import ctypes
import logging
import os
import time
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from blip2_serve.errors import InvalidImage
from blip2_serve.model import decode_worker
from blip2_serve.model.processor import ImageProcessor


def decoder(processor: ImageProcessor) -> decode_worker.Decode:
    def decode(data: bytes) -> NDArray[np.uint8]:
        _, found, words = data.partition(b"do:")
        if not found:
            return processor.pixels(data)
        command, _, rest = words.decode().partition(" ")
        if command == "crash":
            ctypes.string_at(0)
        elif command == "sleep":
            time.sleep(1000)
        elif command == "spin":  # says by a file that it does
            Path(rest or os.devnull).touch()
            while True:
                pass
        elif command == "wait":  # until the test writes to this pipe
            Path(rest).read_bytes()
        elif command == "touch":
            Path(rest).touch()
        elif command == "nonsense":
            return np.zeros((1, 2, 3), np.uint8)
        elif command == "bug":
            try:
                raise KeyError("a bug")
            except KeyError:
                logging.getLogger("decoder").exception("it failed")
            raise InvalidImage("unusable", kind="broken")
        return np.zeros((3, *processor.size), np.uint8)

    return decode


if __name__ == "__main__":
    decode_worker.main(decoder)
