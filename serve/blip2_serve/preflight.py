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

# What this process has Ray make in the folder for temporary files.
RAY_SOCKET = f"/ray/session_2026-11-26_16-28-11_123456_{os.getpid()}/sockets/plasma_store"


def check_model(config: AppConfig, *, local: bool) -> None:
    """The checkpoint can be served, on this machine if `local`; it is downloaded if need be."""
    # Imported late: they take seconds, which the other checks should not.
    import torch

    from blip2_serve.compute.cpu.int8 import check_int8
    from blip2_serve.model.checkpoint import longest_sequence, read_config
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
    on_linux = sys.platform == "linux"
    # As Ray chooses: elsewhere, TMPDIR does not count.
    name = "TMPDIR" if on_linux and "RAY_TMPDIR" not in os.environ else "RAY_TMPDIR"
    folder = os.environ.get(name, "/tmp")  # noqa: S108
    above = next(p for p in (Path(folder), *Path(folder).parents) if p.exists())  # Ray makes others
    if not above.is_dir() or not os.access(above, os.W_OK | os.X_OK):
        raise StartupError(f"{name}={folder} is not a writable folder: set {name} to another one")
    longest = 107 if on_linux else 103  # of a socket's path, in bytes
    excess = len(os.fsencode(folder + RAY_SOCKET)) - longest
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
