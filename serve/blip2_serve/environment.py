"""What replicas need of their environment: threads that share cores, direct ways between stages.

Ray sets REPLICA wherever it starts a replica. What depends on the node (is Intel's OpenMP installed
there, and where?) is decided by the replica itself, in `prepare_replica`.
"""

from __future__ import annotations

import ctypes
import importlib.metadata
import os
from pathlib import Path

# Stages talk to each other directly, whatever proxy the environment names.
NO_PROXY_BETWEEN_STAGES = {"grpc_proxy": ""}

REPLICA = {
    "BLIP2_SERVE_REPLICA": "1",
    **NO_PROXY_BETWEEN_STAGES,
    # On a CPU, torch and oneDNN each keep what they compiled for the last 1,024 shapes, half a
    # megabyte or more apiece; with all lengths of prompts and answers that is a gigabyte.
    "LRU_CACHE_CAPACITY": "128",
    "ONEDNN_PRIMITIVE_CACHE_CAPACITY": "128",
    # Serve's throughput mode would leave warnings and tracebacks in files only.
    "RAY_SERVE_LOG_TO_STDERR": "1",
}


def prepare_replica() -> None:
    """Loads the better OpenMP into this process, if it is a replica; torch must come later.

    What a thread does while it waits for the others decides. If it sleeps, waking it takes as long
    as a small layer; if it spins, it takes the core from another replica. Intel's OpenMP spins for
    as long as it is told and lets any other thread have the core meanwhile; torch's own (libgomp)
    does one or the other, and sleeping is then better. DESIGN.md has the figures.
    """
    if "BLIP2_SERVE_REPLICA" not in os.environ:
        return
    if openmp := _intel_openmp():
        os.environ.setdefault("KMP_BLOCKTIME", "100us")
        # Its functions are found before those of libgomp, which torch brings along.
        ctypes.CDLL(str(openmp), mode=ctypes.RTLD_GLOBAL)
    else:
        os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")


def _intel_openmp() -> Path | None:
    try:
        files = importlib.metadata.files("intel-openmp") or []
    except importlib.metadata.PackageNotFoundError:  # it exists for Linux on x86 only
        return None
    found = (Path(file.locate()).resolve() for file in files if file.name == "libiomp5.so")
    return next(found, None)
