"""A process that decodes images for another one: `python -m blip2_serve.model.decode_worker`.

Image files are whatever strangers send, and their decoders are C libraries. Here they can crash,
hang or ask for too much memory at no other image's cost. `stages/decoding.py` is the other side.

Once it can take images the process sends READY. Then, for each image, it receives REQUEST and the
file, and answers with ANSWER and either the pixels or, as JSON, what is wrong with the file. It
ends when its parent does. Imports neither Ray nor torch.
"""

from __future__ import annotations

import ctypes
import faulthandler
import json
import logging
import os
import resource
import signal
import socket
import struct
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from blip2_serve import machine
from blip2_serve.errors import InvalidImage
from blip2_serve.model.pictures.faults import limit_pixels
from blip2_serve.model.processor import ImageProcessor

READY = b"\1"
REQUEST = struct.Struct("<Q")  # bytes of the file that follows
ANSWER = struct.Struct("<?Q")  # whether pixels follow, and how many bytes

_PR_SET_PDEATHSIG = 1


@dataclass(frozen=True)
class Limits:
    """What one image may have, and take to decode.

    Args:
        pixels: Width times height.
        seconds: Of CPU time.
        memory: In bytes, beside what the process has at its start.
    """

    pixels: int
    seconds: float
    memory: int


@dataclass(frozen=True)
class Task:
    """What the process is told on its command line, as JSON.

    Args:
        descriptor: Of the inherited socket to the parent.
        parent: The parent's process id.
        size, resample: As in `ImageProcessor`.
        limits: The fields of `Limits`.
    """

    descriptor: int
    parent: int
    size: tuple[int, int]
    resample: int
    limits: dict[str, Any]

    def to_json(self) -> str:
        return json.dumps(asdict(self))


Decode = Callable[[bytes], NDArray[np.uint8]]


def main(decoder: Callable[[ImageProcessor], Decode] = lambda processor: processor.pixels) -> None:
    """Runs the process. `decoder` makes what decodes of the processor; tests have others."""
    task = Task(**json.loads(sys.argv[1]))
    limits = Limits(**task.limits)
    signal.pthread_sigmask(signal.SIG_SETMASK, ())  # threads of the parent may block any signal
    _die_with(task.parent)
    machine.give_way()
    faulthandler.enable()  # says on standard error where it crashes
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))  # cores would fill disks, with users' images
    limit_pixels(limits.pixels)
    height, width = task.size
    # The encoder normalises, so the other fields do not matter here.
    processor = ImageProcessor(
        (height, width), (0, 0, 0), (1, 1, 1), 1, Image.Resampling(task.resample)
    )
    decode = decoder(processor)
    log = _Kept()
    logging.getLogger().addHandler(log)
    _limit_memory(limits.memory)
    with socket.socket(fileno=task.descriptor) as parent:
        parent.sendall(READY)
        while (file := _receive(parent)) is not None:
            log.text = ""
            signal.setitimer(signal.ITIMER_PROF, limits.seconds)  # it kills, also within C code
            answer = _answer(decode, file, log)
            signal.setitimer(signal.ITIMER_PROF, 0)
            for part in answer:
                parent.sendall(part)
            del file, answer, part  # they would take from the next image's memory


def _die_with(parent: int) -> None:
    """Has the kernel kill this process when its parent dies, as it may hang by then.

    Elsewhere than on Linux, it ends at the end of its image.
    """
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:  # it has died before
        sys.exit()


def _limit_memory(memory: int) -> None:
    """Limits the address space, as Linux has no limit that counts all kinds of allocations."""
    if sys.platform == "linux":
        with open("/proc/self/statm") as file:
            now = int(file.read().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (now + memory, now + memory))


def _receive(parent: socket.socket) -> bytes | None:
    """The next file; None if the parent has closed the socket."""
    head = parent.recv(REQUEST.size, socket.MSG_WAITALL)
    if len(head) < REQUEST.size:
        return None
    (length,) = REQUEST.unpack(head)
    file = parent.recv(length, socket.MSG_WAITALL)
    return file if len(file) == length else None


def _answer(decode: Decode, file: bytes, log: _Kept) -> tuple[bytes, memoryview]:
    try:
        pixels = decode(file)
        return ANSWER.pack(True, pixels.nbytes), pixels.data.cast("B")
    except InvalidImage as error:
        fault = {"message": error.message, "kind": error.kind, "log": log.text}
    body = json.dumps(fault).encode()
    return ANSWER.pack(False, len(body)), memoryview(body)


class _Kept(logging.Handler):
    """Keeps log lines for the parent, which knows the request that they are about."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.text = ""  # of one image

    def emit(self, record: logging.LogRecord) -> None:
        self.text += self.format(record) + "\n"


if __name__ == "__main__":
    main()
