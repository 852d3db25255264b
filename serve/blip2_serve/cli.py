"""The command line: `blip2-serve up` starts the server, `caption` and `ask` are small clients."""

from __future__ import annotations

import base64
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
from pathlib import Path
from typing import Annotated, Any

import httpx
import typer
import yaml
from pydantic import ValidationError
from rich.console import Console

from blip2_serve import __version__, client, fast_mode, preflight
from blip2_serve.config import AppConfig
from blip2_serve.environment import NO_PROXY_BETWEEN_STAGES
from blip2_serve.errors import StartupError
from blip2_serve.http.validation import explain
from blip2_serve.model.source import DEMO_PICTURE

APP_NAME = "blip2"
EXIT_USAGE = 2
READY_POLL_S = 0.2
STARTED_WITHIN_S = 3600  # a first start downloads gigabytes

_ANY_HOST = ("0.0.0.0", "::")  # noqa: S104 (compared with, not bound to)

cli = typer.Typer(
    help="Serve BLIP-2 OPT models for captions, questions and chat about an image.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)
out = Console(highlight=False, soft_wrap=True)
err = Console(stderr=True, highlight=False, soft_wrap=True)


def main() -> None:
    """The console script. A StartupError is one line and exit code 2."""
    try:
        cli()
    except StartupError as error:
        err.print(f"blip2-serve: {error}", markup=False)
        sys.exit(EXIT_USAGE)


@cli.command()
def version() -> None:
    """Print the version."""
    out.print(__version__)


# -- up --------------------------------------------------------------------------------------------


@cli.command()
def up(
    model: Annotated[
        str | None, typer.Option(help='Folder, hub id, or "demo" for the shipped checkpoint.')
    ] = None,
    host: Annotated[str, typer.Option(help="Address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=1, max=65535)] = 8000,
    device: Annotated[str | None, typer.Option(help="auto, cpu or cuda.")] = None,
    dtype: Annotated[str | None, typer.Option(help="auto, float32, bfloat16 or float16.")] = None,
    quantize: Annotated[
        str | None,
        typer.Option(help="int8: the language model's weights; faster for few users, x86 only."),
    ] = None,
    served_model_name: Annotated[
        str | None, typer.Option(help="Name for clients; by default the hub id or folder's name.")
    ] = None,
    revision: Annotated[str | None, typer.Option(help="Branch, tag or commit of a hub id.")] = None,
    max_model_len: Annotated[
        int | None, typer.Option(help="Image, prompt and answer tokens together.")
    ] = None,
    address: Annotated[
        str | None, typer.Option(help="Deploy to this running Ray instead of an own local one.")
    ] = None,
    config: Annotated[
        Path | None, typer.Option(help="YAML file of the application's configuration.")
    ] = None,
    allow_image_urls: Annotated[
        bool, typer.Option("--allow-image-urls", help="Fetch https image URLs that clients name.")
    ] = False,
    log_format: Annotated[str | None, typer.Option(help="text or json.")] = None,
    trace: Annotated[
        float | None,
        typer.Option(
            min=0, max=1, help="Share of requests to trace, besides those that ask to be traced."
        ),
    ] = None,
    fast: Annotated[
        bool,
        typer.Option("--fast", help="Ray Serve's throughput mode, behind HAProxy; Linux only."),
    ] = False,
) -> None:
    """Start the server and serve until Ctrl-C."""
    if fast:
        fast_mode.check(host, address)
    flags = {
        "model": model,
        "device": device,
        "dtype": dtype,
        "served_model_name": served_model_name,
        "revision": revision,
        "max_model_len": max_model_len,
        "log_format": log_format,
        "generator": None if quantize is None else {"quantize": quantize},
    }
    app_config = read_config(config, {k: v for k, v in flags.items() if v is not None})
    if allow_image_urls:
        app_config = _allow_image_urls(app_config)
    if address is None:
        preflight.check_temporary_folder()
        preflight.check_port(host, port)
    else:
        preflight.check_address(address)
    # Here, as torch and transformers take seconds to load, which --help should not.
    with err.status("reading the checkpoint's configuration"):
        import blip2_serve.compute.cpu.int8  # noqa: F401
    preflight.check_model(app_config, local=address is None)
    url = f"http://{_bracketed('127.0.0.1' if host in _ANY_HOST else host)}:{port}"

    signals = StopSignals()
    signals.install()
    mode = fast_mode.profile(app_config) if fast else contextlib.nullcontext()
    running = _running(app_config, host, port, address, signals, trace)
    with contextlib.suppress(KeyboardInterrupt), mode, running:
        with client.connect(url, on_this_machine=True) as server:
            _wait_until_ready(server)
            if fast:
                _tell_open_ports()
            _greet(server, url, app_config)
        signals.received.wait()


def read_config(file: Path | None, flags: dict[str, Any]) -> AppConfig:
    """The file's configuration with the flags over it, key by key also within a stage.

    Raises:
        StartupError: the file cannot be read, or a key or value is wrong.
    """
    data: Any = {}
    if file is not None:
        try:
            data = yaml.safe_load(file.read_text()) or {}
        except (OSError, yaml.YAMLError) as error:
            raise StartupError(f"cannot read {file}: {error}") from None
        if not isinstance(data, dict):
            raise StartupError(f"{file} must be a mapping of configuration keys")
    merged = {**data, **flags}
    for stage, values in flags.items():
        if isinstance(values, dict) and isinstance(data.get(stage), dict):
            merged[stage] = {**data[stage], **values}
    try:
        return AppConfig.model_validate(merged)
    except ValidationError as error:
        raise StartupError(f"configuration: {explain(error.errors(), merged)}") from None


def _allow_image_urls(config: AppConfig) -> AppConfig:
    images = config.ingress.images.model_copy(update={"allow_urls": True})
    ingress = config.ingress.model_copy(update={"images": images})
    return config.model_copy(update={"ingress": ingress})


class StopSignals:
    """SIGINT and SIGTERM set `received`; the first one also breaks off what is under way."""

    def __init__(self) -> None:
        self.received = threading.Event()

    def install(self) -> None:
        """To be called again after ray.init, whose native code takes SIGTERM for itself."""
        for kind in (signal.SIGINT, signal.SIGTERM):
            signal.signal(kind, self._on_signal)

    def _on_signal(self, *_: object) -> None:
        if not self.received.is_set():  # else already stopping
            self.received.set()
            raise KeyboardInterrupt


@contextlib.contextmanager
def _running(
    config: AppConfig,
    host: str,
    port: int,
    address: str | None,
    signals: StopSignals,
    trace: float | None,
) -> Iterator[None]:
    """Ray with the application on it; both are gone afterwards, a foreign Ray stays."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    # Seconds; the default of 5 gives up where several processes load torch on two busy cores.
    os.environ.setdefault("RAY_SERVE_PROXY_READY_CHECK_TIMEOUT_S", "60")
    os.environ.update(NO_PROXY_BETWEEN_STAGES)
    if address is None:
        # Of one machine, as Ray is by default on other systems: then it listens on loopback only.
        os.environ.setdefault("RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER", "0")
        for name, value in fast_mode.short_hops(config).items():
            os.environ.setdefault(name, value)
    # On purpose, since Ray's default may change: a job submitted to Ray is code that runs.
    os.environ.setdefault("RAY_AUTH_MODE", "token" if address is None else "disabled")
    import ray
    from ray import serve
    from ray.serve.schema import LoggingConfig, TracingConfig

    from blip2_serve.app import build
    from blip2_serve.observe.tracing import OTLP, OTLP_ENDPOINT

    warnings.filterwarnings("ignore", category=FutureWarning, module="ray")
    try:
        _init_ray(address)
        signals.install()
        encoding = "JSON" if config.log_format == "json" else "TEXT"
        quiet = LoggingConfig(log_level="WARNING", encoding=encoding)
        logging.getLogger("ray.serve").setLevel("WARNING")
        serve.start(
            http_options={"host": host, "port": port},
            logging_config=quiet,
            tracing_config=TracingConfig(
                enabled=trace is not None,
                # Without a collector, Serve writes files beside its logs.
                exporter_import_path=OTLP if os.environ.get(OTLP_ENDPOINT) else "",
                sampling_ratio=trace or 0,
            ),
        )
        err.print(f"loading {config.model}")
        try:
            serve.run(build(config), name=APP_NAME, route_prefix="/", logging_config=quiet)
        except RuntimeError as error:
            reason = startup_error(APP_NAME) or error
            raise StartupError(f"the application did not start: {reason}") from None
        yield
    finally:
        if ray.is_initialized():
            err.print("stopping")
            with contextlib.suppress(Exception):
                serve.delete(APP_NAME)  # lets requests under way finish
            ray.shutdown()


def _init_ray(address: str | None) -> None:
    """Starts a Ray of our own, or connects to the one at `address`.

    Raises:
        StartupError: that failed.
    """
    import ray

    try:
        if address is None:
            err.print("starting Ray")
            # Ray starts its workers by a shell, and quotes what they are started with but not this.
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
            raise StartupError(f"Ray does not start: {reason}") from error
        raise StartupError(f"there is no Ray to connect to at {address}: {reason}") from error


def startup_error(application: str) -> str | None:
    """What a replica's own StartupError says, where one kept the application from starting."""
    from ray import serve

    mark = f"{StartupError.__module__}.{StartupError.__name__}: "
    for deployment in serve.status().applications[application].deployments.values():
        for line in deployment.message.splitlines():
            if mark in line:
                return line.rpartition(mark)[2]
    return None


def _wait_until_ready(server: httpx.Client, within_s: float = STARTED_WITHIN_S) -> None:
    deadline = time.monotonic() + within_s
    with err.status("warming up"):
        while time.monotonic() < deadline:
            with contextlib.suppress(httpx.TransportError):
                if server.get("/ready", timeout=5).status_code == httpx.codes.OK:
                    return
            time.sleep(READY_POLL_S)
    raise StartupError(
        f"the application was not ready within {within_s:g} seconds; the lines above say why"
    )


def _greet(server: httpx.Client, url: str, config: AppConfig) -> None:
    caption = _caption_of(server, DEMO_PICTURE)
    out.print(f"\n[bold]{config.model_name}[/] is ready at [bold]{url}[/]")
    out.print(f"{DEMO_PICTURE.name}: {caption}\n", markup=False)
    picture = shlex.quote(f"image=@{DEMO_PICTURE}")
    out.print(f"    curl -F {picture} {url}/v1/caption\n", markup=False)
    out.print("Ctrl-C stops it.")


def _tell_open_ports() -> None:
    owners = [f"{owner} {', '.join(map(str, p))}" for owner, p in fast_mode.open_ports().items()]
    out.print(f"\nopen to the network: {'; '.join(owners) or 'nothing'}", markup=False)


# -- clients ---------------------------------------------------------------------------------------

Url = Annotated[str, typer.Option(help="The server.")]
Image = Annotated[Path, typer.Argument(exists=True, dir_okay=False, readable=True)]


@cli.command()
def caption(image: Image, url: Url = "http://127.0.0.1:8000") -> None:
    """Caption a picture."""
    with client.connect(url) as server:
        out.print(_caption_of(server, image), markup=False)


@cli.command()
def ask(image: Image, question: str, url: Url = "http://127.0.0.1:8000") -> None:
    """Ask a question about a picture."""
    content = [
        {"type": "image_url", "image_url": {"url": data_url(image)}},
        {"type": "text", "text": question},
    ]
    body = {"messages": [{"role": "user", "content": content}]}
    with client.connect(url) as server:
        text = client.post(
            server, "/v1/chat/completions", body, lambda a: a["choices"][0]["message"]["content"]
        )
    out.print(text, markup=False)


def _caption_of(server: httpx.Client, image: Path) -> str:
    body = {"image": data_url(image)}
    return client.post(server, "/v1/caption", body, lambda a: a["data"][0]["caption"])


def data_url(path: Path) -> str:
    """A file as a data URL; the server looks at the bytes, not at the media type."""
    return f"data:application/octet-stream;base64,{base64.b64encode(path.read_bytes()).decode()}"


def _bracketed(host: str) -> str:
    return f"[{host}]" if ":" in host else host
