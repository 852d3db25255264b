"""The environment variables that this package sets, why, and the only code that sets them.

There are three sets: for `up`, which sets them before it imports Ray and passes them on to a local
Ray; for Ray Serve behind HAProxy; and for each replica, wherever Ray starts it.
"""

from __future__ import annotations

import ctypes
import importlib.metadata
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from blip2_serve.config import AppConfig

# Stages reach each other directly, whatever proxy the environment names.
_NO_PROXY_BETWEEN_STAGES = {"grpc_proxy": ""}

# In the processes of a server on one machine: its replicas listen on loopback; a file that, once it
# exists, closes the server to new requests.
LOOPBACK_ONLY = "BLIP2_SERVE_LOOPBACK_ONLY"
CLOSED_FILE = "BLIP2_SERVE_CLOSED_FILE"

# Ray sets these in every replica that it starts.
REPLICA = {
    "BLIP2_SERVE_REPLICA": "1",  # tells `prepare_replica` that it runs in a replica
    **_NO_PROXY_BETWEEN_STAGES,
    # On a CPU, torch and oneDNN each cache code for the last 1,024 shapes, at half a megabyte or
    # more per shape. Prompts and answers of all lengths would fill a gigabyte.
    "LRU_CACHE_CAPACITY": "128",
    "ONEDNN_PRIMITIVE_CACHE_CAPACITY": "128",
}

# The errors of Ray Serve's own proxy have OpenAI's shape.
_PROXY_ERRORS = {"RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH": "blip2_serve.http.proxy.middlewares"}

# Serve kills a replica that has stalled. Otherwise it would wait for it to finish its requests.
_NO_WAITING_FOR_THE_STALLED = {"RAY_SERVE_FORCE_STOP_UNHEALTHY_REPLICAS": "1"}

# Ray's 15 would leave threads that compute next to no lower priority than those that serve.
_SERVING_COMES_FIRST = {"RAY_worker_niceness": "0"}

# A pickled message is a little larger than the image or body in it. Bytes.
_MESSAGE_OVERHEAD = 1 << 20


@dataclass(frozen=True)
class Variables:
    """Variables to set. The operator's own values win over `defaults`, but not over `overrides`."""

    defaults: Mapping[str, str]
    overrides: Mapping[str, str] = field(default_factory=dict)


def of_server(config: AppConfig, *, local: bool, folder: Path) -> Variables:
    """Returns what `up` sets before it imports Ray; `local`: it starts a Ray of its own.

    `folder` is the server's own; the file `closed` in it closes a local server to new requests.
    """
    defaults = {
        "RAY_USAGE_STATS_ENABLED": "0",  # no reports to Ray's makers
        # Seconds. The default of 5 is too short where several processes load torch on two cores.
        "RAY_SERVE_PROXY_READY_CHECK_TIMEOUT_S": "60",
        # Explicit, since Ray's default may change: anyone who can submit a job can run code.
        "RAY_AUTH_MODE": "token" if local else "disabled",
    }
    if local:
        # Restricts Ray to this machine, as on Windows and macOS, so it listens on loopback only.
        defaults["RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"] = "0"
        defaults |= short_hops(config) | _PROXY_ERRORS | _NO_WAITING_FOR_THE_STALLED
        defaults |= _SERVING_COMES_FIRST
        own = {LOOPBACK_ONLY: "1", CLOSED_FILE: str(folder / "closed")}
        return Variables(defaults, _NO_PROXY_BETWEEN_STAGES | own)
    return Variables(defaults, _NO_PROXY_BETWEEN_STAGES)


def of_haproxy(folder: Path, command: Path, ports: range) -> Variables:
    """Returns what `up` sets besides, to run HAProxy by this command with this folder and ports.

    The first of `ports` stays unused: it is the claim on all of them. `folder` has a path short
    enough for sockets in it.
    """
    defaults = {
        # Ray Serve's throughput mode, without its messages in the terminal and its silence in logs.
        "RAY_SERVE_FREEZE_GC_ON_STARTUP": "1",
        "RAY_SERVE_REQUEST_PATH_LOG_BUFFER_SIZE": "1000",
        "RAY_SERVE_ENABLE_HA_PROXY": "1",
        "RAY_SERVE_HAPROXY_STATS_PORT": str(ports[1]),
        "RAY_SERVE_HAPROXY_METRICS_PORT": str(ports[2]),
        "RAY_SERVE_FALLBACK_PROXY_HTTP_PORT": str(ports[3]),
        "RAY_SERVE_DIRECT_INGRESS_MIN_HTTP_PORT": str(ports[4]),  # one per ingress replica
        "RAY_SERVE_DIRECT_INGRESS_MAX_HTTP_PORT": str(ports[-1]),
        "RAY_SERVE_HAPROXY_CONFIG_FILE_LOC": str(folder / "haproxy.cfg"),
        "RAY_SERVE_HAPROXY_SOCKET_PATH": str(folder / "s"),
        "RAY_SERVE_HAPROXY_METRICS_SOCKET_PATH": str(folder / "m"),
        "RAY_SERVE_HAPROXY_SERVER_STATE_BASE": str(folder),
        "RAY_SERVE_HAPROXY_SERVER_STATE_FILE": str(folder / "server-state"),
        # A request whose replica dies before it answers goes to another one, if it fits HAProxy's
        # buffer (bytes; some for each busy connection). No request has effects, so all may.
        "RAY_SERVE_HAPROXY_RETRY_ON": "conn-failure empty-response",
        "RAY_SERVE_HAPROXY_TUNE_BUFSIZE": "262144",
        # One refused connection is enough to turn to the others until health checks succeed again.
        "RAY_SERVE_HAPROXY_OBSERVE_ERROR_LIMIT": "1",
        # Seconds that a stopping replica stays open until the balancer notices. HAProxy retries on
        # another replica; the default would delay the server's stop by half a minute.
        "RAY_SERVE_DIRECT_INGRESS_MIN_DRAINING_PERIOD_S": "1",
    }
    # The operator's own HAProxy is the one that `command` starts.
    return Variables(defaults, {"RAY_SERVE_HAPROXY_BINARY_PATH": str(command)})


def short_hops(config: AppConfig) -> dict[str, str]:
    """Returns Ray Serve's variables for stages that talk by gRPC and have one event loop each."""
    ingress = config.ingress
    largest = max(ingress.max_body_bytes, ingress.images.max_bytes) + _MESSAGE_OVERHEAD
    return {
        "RAY_SERVE_USE_GRPC_BY_DEFAULT": "1",
        "RAY_SERVE_REPLICA_GRPC_MAX_MESSAGE_LENGTH": str(largest),  # bytes; 4 MB by default
        "RAY_SERVE_RUN_ROUTER_IN_SEPARATE_LOOP": "0",
        "RAY_SERVE_RUN_USER_CODE_IN_SEPARATE_THREAD": "0",
        # Seconds. An event loop that also runs the stage's code answers routers later.
        "RAY_SERVE_QUEUE_LENGTH_RESPONSE_DEADLINE_S": "1",
    }


@contextmanager
def applied(variables: Variables) -> Iterator[None]:
    """Sets the variables in this process for the block; afterwards they are as before."""
    before = {name: os.environ.get(name) for name in (*variables.defaults, *variables.overrides)}
    for name, value in variables.defaults.items():
        os.environ.setdefault(name, value)
    os.environ.update(variables.overrides)
    try:
        yield
    finally:
        for name, old in before.items():
            if old is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = old


def prepare_replica() -> None:
    """Loads Intel's OpenMP into this process, if it is a replica; must run before torch loads.

    What counts is how a thread waits for the others. A thread that sleeps takes as long to wake as
    a small layer takes to compute; one that spins takes the core from another replica. Intel's
    OpenMP spins for a given time and yields the core to any other thread meanwhile. torch's own
    (libgomp) can only sleep or spin, and sleeping is the better of the two. Figures are in
    docs/lab/2026-11-threads-and-memory.md.
    """
    if "BLIP2_SERVE_REPLICA" not in os.environ:
        return
    if openmp := _intel_openmp():
        os.environ.setdefault("KMP_BLOCKTIME", "100us")
        # Global symbols of a library loaded first hide those of libgomp, which torch brings along.
        ctypes.CDLL(str(openmp), mode=ctypes.RTLD_GLOBAL)
    else:
        os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")


def stays_on_loopback() -> bool:
    """Whether this process is a replica of a server on one machine."""
    return {"BLIP2_SERVE_REPLICA", LOOPBACK_ONLY} <= os.environ.keys()


def _intel_openmp() -> Path | None:
    """Intel's OpenMP as installed on this node, which may differ from other nodes."""
    try:
        files = importlib.metadata.files("intel-openmp") or []
    except importlib.metadata.PackageNotFoundError:  # it exists for Linux on x86 only
        return None
    found = (Path(file.locate()).resolve() for file in files if file.name == "libiomp5.so")
    return next(found, None)
