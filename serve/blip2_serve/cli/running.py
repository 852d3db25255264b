"""`blip2-serve up`: Ray with the application on it, from the first check to the last signal."""

from __future__ import annotations

import contextlib
import logging
import os
import shlex
import signal
import sys
import threading
import time
import warnings
from collections.abc import Iterator
from dataclasses import dataclass

import httpx

from blip2_serve import client, environment, fast_mode, preflight
from blip2_serve.cli.terminal import err, greet, tell_open_ports
from blip2_serve.config import AppConfig
from blip2_serve.errors import StartupError

APP_NAME = "blip2"
READY_POLL_S = 0.2
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
    fast: bool = False

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
    if launch.fast:
        fast_mode.check(launch.host, launch.address)
    if launch.address is None:
        preflight.check_temporary_folder()
        preflight.check_port(launch.host, launch.port)
    else:
        preflight.check_address(launch.address)
    # Imported late: torch and transformers take seconds, which --help should not.
    with err.status("reading the checkpoint's configuration"):
        import blip2_serve.compute.devices  # noqa: F401
    preflight.check_model(launch.config, local=launch.address is None)


def serve_until_stopped(launch: Launch) -> None:
    """Starts the server, says when it is ready, and returns after SIGINT or SIGTERM.

    Raises:
        StartupError: the server did not start.
    """
    signals = StopSignals()
    signals.install()
    mode = fast_mode.profile(launch.config) if launch.fast else contextlib.nullcontext()
    with contextlib.suppress(KeyboardInterrupt), mode, _running(launch, signals):
        with client.connect(launch.url, on_this_machine=True) as server:
            wait_until_ready(server)
            if launch.fast:
                tell_open_ports()
            greet(server, launch.url, launch.config.model_name)
        signals.received.wait()


class StopSignals:
    """SIGINT and SIGTERM set `received`; the first one also interrupts what is under way."""

    def __init__(self) -> None:
        self.received = threading.Event()

    def install(self) -> None:
        """Takes over both signals; to be called again after ray.init, which takes SIGTERM."""
        for kind in (signal.SIGINT, signal.SIGTERM):
            signal.signal(kind, self._on_signal)

    def _on_signal(self, *_: object) -> None:
        if not self.received.is_set():  # else it is stopping already
            self.received.set()
            raise KeyboardInterrupt


@contextlib.contextmanager
def _running(launch: Launch, signals: StopSignals) -> Iterator[None]:
    """Runs Ray with the application on it; both stop afterwards, but not a Ray at `address`."""
    with environment.applied(environment.of_server(launch.config, local=launch.address is None)):
        import ray  # only now: it reads the environment when it is imported
        from ray import serve

        warnings.filterwarnings("ignore", category=FutureWarning, module="ray")
        try:
            _init_ray(launch.address)
            signals.install()
            _start_application(launch)
            yield
        finally:
            if ray.is_initialized():
                err.print("stopping")
                with contextlib.suppress(Exception):
                    serve.delete(APP_NAME)  # lets requests under way finish
                ray.shutdown()


def _init_ray(address: str | None) -> None:
    """Starts a local Ray, or connects to the one at `address`.

    Raises:
        StartupError: that failed.
    """
    import ray

    try:
        if address is None:
            err.print("starting Ray")
            # Ray starts workers through a shell and does not quote the interpreter's path.
            quoted = shlex.quote(sys.executable)
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


def _start_application(launch: Launch) -> None:
    """Starts Ray Serve and the application on a Ray that runs.

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
        http_options={"host": launch.host, "port": launch.port},
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
        serve.run(build(config), name=APP_NAME, route_prefix="/", logging_config=quiet)
    except RuntimeError as error:
        reason = startup_error(APP_NAME) or error
        raise StartupError(f"the application did not start: {reason}") from None


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
