"""`blip2-serve up`: Ray with the application on it, from the first check to the last signal."""

from __future__ import annotations

import contextlib
import logging
import os
import shlex
import shutil
import signal
import sys
import tempfile
import threading
import time
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx

from blip2_serve import client, environment, haproxy, preflight
from blip2_serve.cli.terminal import err, greet
from blip2_serve.config import AppConfig
from blip2_serve.errors import StartupError
from blip2_serve.http.keys import KeyFile

APP_NAME = "blip2"
READY_POLL_S = 0.2
PROGRESS_EVERY_S = 0.5
DRAIN_POLL_S = 0.1
STARTED_WITHIN_S = 3600  # a first start downloads gigabytes

_ANY_HOST = ("0.0.0.0", "::")  # noqa: S104 (compared with, not bound to)


@dataclass(frozen=True)
class Launch:
    """The server that `up` was asked for."""

    config: AppConfig
    host: str
    port: int
    address: str | None = None  # of a running Ray; None: start a local one
    trace: float | None = None  # share of requests to trace, 0 to 1; None: trace none

    @property
    def url(self) -> str:
        """The server's URL for clients on this machine."""
        host = "127.0.0.1" if self.host in _ANY_HOST else self.host
        return f"http://[{host}]:{self.port}" if ":" in host else f"http://{host}:{self.port}"


def check(launch: Launch) -> None:
    """Finds what would keep the server from starting, before anything is started.

    Raises:
        StartupError: something would.
    """
    if launch.address is None:
        preflight.check_temporary_folder()
        preflight.check_port(launch.host, launch.port)
    else:
        preflight.check_address(launch.address)
    # Imported late: torch and transformers take seconds, which --help should not.
    with err.status("reading the checkpoint's configuration"):
        import blip2_serve.compute.devices  # noqa: F401
    preflight.check_model(launch.config, local=launch.address is None)
    if launch.address is None and launch.config.ingress.access.keys_file:
        KeyFile(Path(launch.config.ingress.access.keys_file))


def serve_until_stopped(launch: Launch) -> None:
    """Starts the server, says when it is ready, and returns after SIGINT or SIGTERM.

    Raises:
        StartupError: the server did not start.
    """
    signals = StopSignals()
    signals.install()
    with (
        contextlib.suppress(KeyboardInterrupt),
        _folder() as folder,
        _proxy(launch, folder) as host,
        _running(launch, folder, host, signals),
    ):
        with client.connect(launch.url, on_this_machine=True) as server:
            wait_until_ready(server)
            greet(server, launch.url, launch.config)
        signals.first.wait()


@contextlib.contextmanager
def _folder() -> Iterator[Path]:
    """A folder for the server's files, which only its owner can read."""
    folder = Path(tempfile.mkdtemp(prefix="blip2-"))
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


@contextlib.contextmanager
def _proxy(launch: Launch, folder: Path) -> Iterator[str]:
    """Sets up HAProxy, where it can run; yields the address that Ray Serve listens on."""
    if reason := haproxy.missing(launch.address):
        err.print(f"without HAProxy: {reason}", markup=False)
        yield launch.host
    else:
        body_timeout_s = launch.config.ingress.admission.body_timeout_s
        with haproxy.profile(launch.host, folder, body_timeout_s):
            yield "127.0.0.1"  # HAProxy listens on the host


class StopSignals:
    """SIGINT and SIGTERM set `first`, then `second`, and each time interrupt what is under way."""

    def __init__(self) -> None:
        self.first = threading.Event()
        self.second = threading.Event()

    def install(self) -> None:
        """Takes over both signals; to be called again after ray.init, which takes SIGTERM."""
        for kind in (signal.SIGINT, signal.SIGTERM):
            signal.signal(kind, self._on_signal)

    def _on_signal(self, *_: object) -> None:
        if not self.second.is_set():  # else it is stopping at once already
            (self.second if self.first.is_set() else self.first).set()
            raise KeyboardInterrupt


@contextlib.contextmanager
def _running(launch: Launch, folder: Path, host: str, signals: StopSignals) -> Iterator[None]:
    """Runs Ray with the application on it; both stop afterwards, but not a Ray at `address`."""
    local = launch.address is None
    with environment.applied(environment.of_server(launch.config, local=local, folder=folder)):
        import ray  # only now: it reads the environment when it is imported

        from blip2_serve.serve_internals import hide_worker_lines

        warnings.filterwarnings("ignore", category=FutureWarning, module="ray")
        try:
            _init_ray(launch.address)
            if local:
                hide_worker_lines("won't accept connections from HAProxy on other nodes")
            signals.install()
            _start_application(launch, host)
            yield
        finally:
            if ray.is_initialized():
                err.print("stopping")
                with contextlib.suppress(KeyboardInterrupt, Exception):
                    _stop_application(launch)
                ray.shutdown()


def _stop_application(launch: Launch) -> None:
    """Lets requests under way finish: on a Ray of its own, within the grace period.

    Raises:
        KeyboardInterrupt: a second signal came.
    """
    from ray import serve

    from blip2_serve.serve_internals import ongoing_requests

    if launch.address is not None:
        serve.delete(APP_NAME)
        return
    Path(os.environ[environment.CLOSED_FILE]).touch()
    grace_s = launch.config.shutdown_grace_s
    grace_ends = time.monotonic() + grace_s
    while True:
        time.sleep(DRAIN_POLL_S)  # first, for a request that got in just before the door closed
        if not ongoing_requests(APP_NAME, "Ingress"):
            return
        if time.monotonic() > grace_ends:
            err.print(f"cutting off requests that took longer than shutdown_grace_s ({grace_s:g})")
            return


def _init_ray(address: str | None) -> None:
    """Starts a local Ray, or connects to the one at `address`.

    Raises:
        StartupError: that failed.
    """
    import ray

    from blip2_serve.serve_internals import ray_in_its_own_session

    try:
        if address is None:
            err.print("starting Ray")
            # Ray starts workers through a shell and does not quote the interpreter's path.
            quoted = shlex.quote(sys.executable)
            with ray_in_its_own_session():
                ray.init(
                    address="local",
                    include_dashboard=False,
                    logging_level=logging.WARNING,
                    runtime_env=None if quoted == sys.executable else {"py_executable": quoted},
                )
        else:
            ray.init(address=address, logging_level=logging.WARNING)
    except Exception as error:
        reason = (str(error).strip() or repr(error)).splitlines()[0]
        if address is None:
            raise StartupError(f"Ray did not start: {reason}") from error
        raise StartupError(
            f"cannot connect to Ray at {address} ({reason}): check that a Ray of the same version "
            "runs there"
        ) from error


def _start_application(launch: Launch, host: str) -> None:
    """Starts Ray Serve, listening on `host`, and the application on a Ray that runs.

    Raises:
        StartupError: the application did not start.
    """
    from ray import serve
    from ray.serve.schema import LoggingConfig, TracingConfig

    from blip2_serve.app import build
    from blip2_serve.observe.tracing import OTLP, OTLP_ENDPOINT

    config = launch.config
    encoding = "JSON" if config.log_format == "json" else "TEXT"
    quiet = LoggingConfig(log_level="WARNING", encoding=encoding)
    logging.getLogger("ray.serve").setLevel("WARNING")
    serve.start(
        http_options={
            "host": host,
            "port": launch.port,
            "request_timeout_s": config.request_timeout_s,
        },
        logging_config=quiet,
        tracing_config=TracingConfig(
            enabled=launch.trace is not None,
            # Without a collector, Ray Serve writes files beside its logs.
            exporter_import_path=OTLP if os.environ.get(OTLP_ENDPOINT) else "",
            sampling_ratio=launch.trace or 0,
        ),
    )
    err.print(f"loading {config.model}")
    try:
        with _progress():
            serve.run(build(config), name=APP_NAME, route_prefix="/", logging_config=quiet)
    except RuntimeError as error:
        reason = startup_error(APP_NAME) or error
        raise StartupError(f"the application did not start: {reason}") from None


@contextlib.contextmanager
def _progress() -> Iterator[None]:
    """Says, in a terminal, how many replicas of each stage have loaded."""
    from ray import serve

    over = threading.Event()

    def tell() -> None:
        while not over.wait(PROGRESS_EVERY_S):
            with contextlib.suppress(Exception):  # the controller is not there yet
                line.update(loaded(serve.status().applications[APP_NAME].deployments))

    with err.status("starting Ray Serve") as line:
        telling = threading.Thread(target=tell, daemon=True)
        telling.start()
        try:
            yield
        finally:
            over.set()
            telling.join()


def loaded(deployments: Mapping[str, Any]) -> str:
    """How many replicas of each deployment run, of those that are there."""
    counts = {
        name.lower(): (found.replica_states.get("RUNNING", 0), sum(found.replica_states.values()))
        for name, found in deployments.items()
    }
    return ", ".join(f"{name} {running} of {count}" for name, (running, count) in counts.items())


def startup_error(application: str) -> str | None:
    """Returns the message of the StartupError that kept a replica from starting, if one did."""
    from ray import serve

    mark = f"{StartupError.__module__}.{StartupError.__name__}: "
    for deployment in serve.status().applications[application].deployments.values():
        for line in deployment.message.splitlines():
            if mark in line:
                return line.rpartition(mark)[2]
    return None


def wait_until_ready(server: httpx.Client, within_s: float = STARTED_WITHIN_S) -> None:
    """Returns once the server says that it is ready.

    Raises:
        StartupError: it does not within so many seconds.
    """
    deadline = time.monotonic() + within_s
    with err.status("warming up"):
        while time.monotonic() < deadline:
            with contextlib.suppress(httpx.TransportError):
                if server.get("/ready", timeout=5).status_code == httpx.codes.OK:
                    return
            time.sleep(READY_POLL_S)
    raise StartupError(
        f"the application was not ready within {within_s:g} seconds: see the log lines above"
    )
