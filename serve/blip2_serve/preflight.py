"""What would keep a server from starting, found before anything is started.

A check's docstring states what must hold; otherwise it raises a StartupError that says what to do.
"""

from __future__ import annotations

import os
import socket
import sys
from pathlib import Path

from blip2_serve.config import AppConfig
from blip2_serve.errors import StartupError
from blip2_serve.model.source import DEMO, find_folder

ADDRESS_TIMEOUT_S = 10

# What Ray makes in the folder for temporary files, with the largest process id there can be; and
# how long a socket's path may be: on macOS and BSD three bytes shorter than on Linux.
RAY_SOCKET = "/ray/session_2026-11-26_16-28-11_123456_4194304/sockets/plasma_store"
LONGEST_SOCKET = 107 if sys.platform == "linux" else 103


def check_model(config: AppConfig, *, local: bool) -> None:
    """The checkpoint can be served, on this machine if `local`; it is downloaded if need be."""
    # Imported late: they take seconds, which the other checks should not.
    import torch

    from blip2_serve.model.checkpoint import longest_sequence, read_config
    from blip2_serve.model.int8 import check_int8
    from blip2_serve.model.processor import ImageProcessor

    if local and config.device == "cuda" and not torch.cuda.is_available():
        raise StartupError("no CUDA device on this machine: use --device cpu")
    if local and config.generator.quantize:
        on_gpu = config.device != "cpu" and torch.cuda.is_available()
        check_int8(torch.device("cuda" if on_gpu else "cpu"))
    if not local and not Path(config.model).exists() and config.model != DEMO:
        return  # a hub id or a path of the cluster's machines
    folder = find_folder(config.model, config.revision)
    longest_sequence(read_config(folder), config.max_model_len)
    ImageProcessor.load(folder)


def check_temporary_folder() -> None:
    """Ray can have its sockets in the folder for temporary files."""
    name = "RAY_TMPDIR" if "RAY_TMPDIR" in os.environ else "TMPDIR"
    folder = os.environ.get(name, "/tmp")  # noqa: S108 (as Ray chooses)
    above = next(p for p in (Path(folder), *Path(folder).parents) if p.exists())  # Ray makes others
    if not above.is_dir() or not os.access(above, os.W_OK | os.X_OK):
        raise StartupError(f"{name}={folder} is no folder that can be written to: set another one")
    excess = len(os.fsencode(folder + RAY_SOCKET)) - LONGEST_SOCKET
    if excess > 0:
        raise StartupError(
            f"{name}={folder} is {excess} bytes too long for the sockets that Ray makes in it: set "
            f"{name} to a shorter path, such as /tmp"
        )


def check_address(address: str) -> None:
    """Somebody listens where a Ray should be; Ray itself would try for minutes."""
    host, _, port = address.rpartition(":")
    if not port.isdecimal() or "/" in host:  # "auto", "ray://..."
        return
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=ADDRESS_TIMEOUT_S).close()
    except (OSError, OverflowError) as error:
        raise StartupError(
            f"no Ray listens at {address} ({error}): give --address the one of a running cluster's "
            "head, or leave it out to start a Ray here"
        ) from None


def check_port(host: str, port: int) -> None:
    """The port can be listened on."""
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        with socket.socket(family, socket.SOCK_STREAM) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind((host, port))
    except OSError as error:
        raise StartupError(
            f"cannot listen on {host}:{port} ({error.strerror}): "
            "choose another with --port or --host"
        ) from None
