"""What `blip2-serve doctor` looks at: whether a server can run here, and how well.

Each examination yields findings. One that is bad says what to do, since it keeps `up` from
starting; one that is odd costs speed or confuses clients.
"""

from __future__ import annotations

import importlib.metadata
import os
import platform
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Literal

from blip2_serve import haproxy, machine, preflight
from blip2_serve.config import AppConfig
from blip2_serve.errors import StartupError

GB = 1e9
FEW_FILES = 4096  # connections, sockets of Ray's, memory-mapped files
BESIDE_WEIGHTS = 3.5 * GB  # of Ray's and the replicas' processes, with the shipped checkpoint
PROXIES = ("http_proxy", "https_proxy", "all_proxy")
PACKAGES = ("ray", "torch", "transformers", "pillow")

State = Literal["good", "odd", "bad"]


@dataclass(frozen=True)
class Finding:
    """`advice` says what to do; empty where nothing is to be done."""

    state: State
    about: str
    seen: str
    advice: str = ""


def examine(config: AppConfig, host: str, port: int) -> Iterator[Finding]:
    """All findings about a server with this configuration, on this machine."""
    yield _python()
    yield _packages()
    yield _cores()
    yield _files()
    yield from _proxies()
    checked = preflight.check_temporary_folder
    yield _checked("temporary files", "Ray's sockets fit into their folder", checked)
    yield _checked("port", f"{host}:{port} is free", lambda: preflight.check_port(host, port))
    yield _haproxy()
    yield from _model(config)


def _checked(about: str, seen: str, check: Callable[[], None]) -> Finding:
    """`seen` if the check is passed; else its error, which says what to do."""
    try:
        check()
    except StartupError as error:
        return _bad(about, error)
    return Finding("good", about, seen)


def _bad(about: str, error: StartupError) -> Finding:
    """These errors say what to do behind their last colon."""
    problem, _, advice = str(error).rpartition(": ")
    return Finding("bad", about, problem, advice)


def _python() -> Finding:
    seen = f"{platform.python_version()}, {sys.executable}"
    return Finding("good", "Python", seen)


def _packages() -> Finding:
    versions = [f"{name} {importlib.metadata.version(name)}" for name in PACKAGES]
    return Finding("good", "packages", ", ".join(versions))


def _cores() -> Finding:
    cores, all_cores = machine.cores(), os.cpu_count() or 1
    seen = f"{cores} that this process may use"
    seen += "" if cores == all_cores else f", of {all_cores}"
    return Finding("good", "CPU cores", seen)


def _files() -> Finding:
    import resource

    limit, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    if limit < FEW_FILES:
        advice = f"raise the limit, such as by `ulimit -n {min(65_536, max(limit, most))}`"
        return Finding("odd", "open files", f"{limit} at most: a few connections each", advice)
    return Finding("good", "open files", f"{limit} at most")


def _proxies() -> Iterator[Finding]:
    names = [name for name in (*PROXIES, *map(str.upper, PROXIES)) if os.environ.get(name)]
    if not names:
        return
    exempt = os.environ.get("no_proxy", os.environ.get("NO_PROXY", ""))
    seen = f"the environment has {', '.join(names)}"
    if "127.0.0.1" in exempt or exempt.strip() == "*":
        yield Finding("good", "proxies", f"{seen}, but not for this machine")
        return
    advice = (
        "set no_proxy=127.0.0.1,localhost for clients on this machine, such as curl; the server "
        "itself and these commands go there directly"
    )
    yield Finding("odd", "proxies", seen, advice)


def _haproxy() -> Finding:
    if reason := haproxy.missing(None):
        seen = f"{reason}: Ray Serve's own proxy takes its place, and more of the CPU"
        return Finding("odd", "HAProxy", seen, "install Debian's package haproxy, on Linux")
    return Finding("good", "HAProxy", "is there")


def _model(config: AppConfig) -> Iterator[Finding]:
    """The device, the checkpoint's files, and whether there is memory for its weights."""
    import torch

    from blip2_serve.compute.cpu import dot_product, int8_product
    from blip2_serve.model.checkpoint import open_checkpoint, resolve_dtype
    from blip2_serve.model.source import local_folder

    on_gpu = config.device != "cpu" and torch.cuda.is_available()
    place = torch.device("cuda" if on_gpu else "cpu")
    if on_gpu:
        free, memory = torch.cuda.mem_get_info()
        name, capability = torch.cuda.get_device_name(), torch.cuda.get_device_capability()
        seen = f"{name}, {memory / GB:.0f} GB, compute capability {capability[0]}.{capability[1]}"
        yield Finding("good", "device", f"{seen}, CUDA {torch.version.cuda}")
    else:
        free = machine.available_memory()
        kernels = {"bfloat16": dot_product.available(), "int8": int8_product.available()}
        fast = [name for name, there in kernels.items() if there]
        seen = f"CPU, with fast kernels for {' and '.join(fast) or 'float32 only'}"
        advice = "" if torch.version.cuda is None else "check the driver with nvidia-smi"
        wanted = config.device == "cuda" or advice
        yield Finding("odd" if wanted else "good", "device", seen, advice)
    try:
        if local_folder(config.model) is None:
            seen = f"{config.model} is on the hub: `up` downloads it"
            yield Finding("odd", "checkpoint", seen)
            return
        preflight.check_model(config, local=True)
        checkpoint = open_checkpoint(config.model, config.revision)
        dtype = resolve_dtype(config.dtype, place, checkpoint.config)
    except StartupError as error:
        yield _bad("checkpoint", error)
        return
    yield Finding("good", "checkpoint", f"{config.model} is complete")
    stored = sum(path.stat().st_size for path in {*checkpoint.files.values()})
    kept = getattr(checkpoint.config, "dtype", None) or torch.float32
    needed = stored * dtype.itemsize / kept.itemsize + (0 if on_gpu else BESIDE_WEIGHTS)
    kind = str(dtype).removeprefix("torch.")
    seen = f"{needed / GB:.1f} GB needed, as {kind}; {free / GB:.1f} GB are free"
    if needed > free:
        advice = "free some, take a smaller --dtype, or a machine with more"
        yield Finding("bad", "memory", seen, advice)
    else:
        yield Finding("good", "memory", seen)
