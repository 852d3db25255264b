"""Checks for what would keep a server from starting, made before anything is started.

The docstring of a check states what must hold. If it does not, the check raises a StartupError that
says what to do.
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

# The longest path that Ray makes for this process in the folder for temporary files.
RAY_SOCKET = f"/ray/session_2026-11-26_16-28-11_123456_{os.getpid()}/sockets/plasma_store"


def check_model(config: AppConfig, *, local: bool) -> None:
    """The checkpoint can be served, on this machine if `local`. Downloads it if necessary."""
    # Imported late: these take seconds, which the other checks should not.
    import torch

    from blip2_serve.compute.devices import check_quantize
    from blip2_serve.model.checkpoint import longest_sequence, read_config
    from blip2_serve.model.processor import ImageProcessor

    if local and config.device == "cuda" and not torch.cuda.is_available():
        raise StartupError("this machine has no CUDA device: use --device cpu")
    if local:
        on_gpu = config.device != "cpu" and torch.cuda.is_available()
        place = torch.device("cuda" if on_gpu else "cpu")
        check_quantize(place, config.generator.quantize)
        check_quantize(place, config.encoder.quantize)
    if not local and not Path(config.model).exists() and config.model != DEMO:
        return  # a hub id, or a path on the cluster's machines
    folder = find_folder(config.model, config.revision)
    longest_sequence(read_config(folder), config.max_model_len)
    ImageProcessor.load(folder)


def check_temporary_folder() -> None:
    """Ray can make its sockets in the folder for temporary files."""
    on_linux = sys.platform == "linux"
    # As Ray chooses; it ignores TMPDIR on other systems.
    name = "TMPDIR" if on_linux and "RAY_TMPDIR" not in os.environ else "RAY_TMPDIR"
    folder = os.environ.get(name, "/tmp")  # noqa: S108
    # Ray makes the folders that are missing.
    existing = next(p for p in (Path(folder), *Path(folder).parents) if p.exists())
    if not existing.is_dir() or not os.access(existing, os.W_OK | os.X_OK):
        raise StartupError(f"{name}={folder} is not a writable folder: set {name} to another one")
    longest = 107 if on_linux else 103  # bytes that a socket's path may have
    excess = len(os.fsencode(folder + RAY_SOCKET)) - longest
    if excess > 0:
        raise StartupError(
            f"{name}={folder} is {excess} bytes too long for Ray's sockets in it: set {name} to a "
            "shorter path, such as /tmp"
        )


def check_address(address: str) -> None:
    """Something listens where Ray should be; Ray itself would try for minutes."""
    host, _, port = address.rpartition(":")
    if not port.isdecimal() or "/" in host:  # "auto", "ray://..."
        return
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=ADDRESS_TIMEOUT_S).close()
    except (OSError, OverflowError) as error:
        raise StartupError(
            f"no Ray listens at {address} ({error}): set --address to the head of a running "
            "cluster, or leave it out to start Ray on this machine"
        ) from None


def check_port(host: str, port: int) -> None:
    """The server can listen on this port."""
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        with socket.socket(family, socket.SOCK_STREAM) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind((host, port))
    except OSError as error:
        raise StartupError(
            f"cannot listen on {host}:{port} ({error.strerror}): "
            "choose another one with --port or --host"
        ) from None
