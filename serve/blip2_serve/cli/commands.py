"""The commands: what `blip2-serve` understands, and in which order each does its work."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import typer

from blip2_serve import __version__, client
from blip2_serve.cli import asking, handover, options, running, watching
from blip2_serve.cli.configuration import read_config
from blip2_serve.cli.terminal import err, out, report
from blip2_serve.doctor import examine
from blip2_serve.errors import StartupError
from blip2_serve.http.keys import add_key

EXIT_INCOMPLETE, EXIT_USAGE = 1, 2
URL = "http://127.0.0.1:8000"
MORE = {"allow_extra_args": True, "ignore_unknown_options": True}
LATER = {**MORE, "allow_interspersed_args": False}  # all options after the name are its own

app = typer.Typer(
    help="Serve BLIP-2 OPT models: captions, questions and chat about an image.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)
keys = typer.Typer(help="API keys, for `up --api-keys`.", no_args_is_help=True)
app.add_typer(keys, name="keys")


def main() -> None:
    """Runs the command line; a StartupError becomes one line and exit code 2."""
    try:
        app()
    except StartupError as error:
        err.print(f"blip2-serve: {error}", markup=False)
        sys.exit(EXIT_USAGE)


def example(*lines: str) -> str:
    """The end of a command's help."""
    return "Examples:\n\n" + "\n\n".join(f"    blip2-serve {line}" for line in lines)


@app.command()
def version() -> None:
    """Print the version."""
    out.print(__version__)


@app.command(
    epilog=example("up", "up --model Salesforce/blip2-opt-2.7b-coco", "up --config my.yaml")
)
def up(
    model: options.Model = None,
    host: options.Host = "127.0.0.1",
    port: options.Port = 8000,
    device: options.Device = None,
    dtype: options.Dtype = None,
    quantize: options.Quantize = None,
    served_model_name: options.ServedModelName = None,
    revision: options.Revision = None,
    max_model_len: options.MaxModelLen = None,
    address: options.Address = None,
    config: options.Config = None,
    allow_image_urls: options.AllowImageUrls = False,
    api_keys: options.ApiKeys = None,
    log_format: options.LogFormat = None,
    trace: options.Trace = None,
) -> None:
    """Start the server and serve until Ctrl-C."""
    flags = given(
        {
            "model": model,
            "device": device,
            "dtype": dtype,
            "served_model_name": served_model_name,
            "revision": revision,
            "max_model_len": max_model_len,
            "log_format": log_format,
            "generator": {"quantize": quantize},
            "ingress": {
                "images": {"allow_urls": allow_image_urls or None},
                "access": {"keys_file": api_keys and str(api_keys.resolve())},
            },
        }
    )
    launch = running.Launch(read_config(config, flags), host, port, address, trace)
    running.check(launch)
    running.serve_until_stopped(launch)


def given(flags: dict[str, Any]) -> dict[str, Any]:
    """Leaves out flags that were not given (None), and mappings that have none left."""
    nested = {k: given(v) if isinstance(v, dict) else v for k, v in flags.items()}
    return {k: v for k, v in nested.items() if v not in (None, {})}


@app.command(epilog=example("doctor", "doctor --model Salesforce/blip2-opt-2.7b-coco"))
def doctor(
    model: options.Model = None,
    host: options.Host = "127.0.0.1",
    port: options.Port = 8000,
    device: options.Device = None,
    dtype: options.Dtype = None,
    quantize: options.Quantize = None,
    config: options.Config = None,
) -> None:
    """Look for what would keep `up` from starting here, or make it slow."""
    flags = given(
        {"model": model, "device": device, "dtype": dtype, "generator": {"quantize": quantize}}
    )
    findings = examine(read_config(config, flags), host, port)
    if not report(findings):
        sys.exit(EXIT_INCOMPLETE)


@app.command(
    epilog=example(
        "caption photo.jpg", "caption photos/ --json > captions.jsonl", "caption - < a.png"
    )
)
def caption(
    images: options.Images, url: options.Url = URL, as_json: options.AsJson = False
) -> None:
    """Caption images: files, folders of them, or standard input."""
    with client.connect(url) as server:
        complete = asking.caption_all(server, images, as_json=as_json)
    if not complete:
        sys.exit(EXIT_INCOMPLETE)


@app.command(epilog=example('ask photo.jpg "what is on the table?"', "ask photo.jpg"))
def ask(image: options.Image, question: options.Question = None, url: options.Url = URL) -> None:
    """Ask about an image: one question, or a chat."""
    with client.connect(url) as server:
        asking.ask(server, image, question)


@app.command(epilog=example("status", "status --watch --url http://10.0.0.5:8000"))
def status(url: options.Url = URL, watch: options.Watch = False) -> None:
    """Show what the stages of a server are doing."""
    with client.connect(url) as server:
        (watching.watch if watch else watching.show)(server)


@app.command(context_settings=MORE, epilog=example("load", "load steady --level 8 --seconds 60"))
def load(
    context: typer.Context,
    scenario: options.Scenario = "mixed",
    url: options.Url = URL,
    output: options.Output = None,
) -> None:
    """Load-test a server with locust; further options are the scenario's and locust's."""
    folder = output or Path("results") / Path(scenario).stem
    handover.hand_over(handover.load_command(scenario, url, folder, context.args))


@app.command(context_settings=LATER, epilog=example("bench", "bench hops --help"))
def bench(context: typer.Context, name: options.Benchmark = None) -> None:
    """Run one of the repository's benchmarks; further options are its own."""
    handover.hand_over(handover.bench_command(name, context.args))


@keys.command(epilog=example("keys add alice --file keys.yaml --requests-per-minute 60"))
def add(
    name: options.KeyName,
    file: options.KeysFile,
    requests_per_minute: options.PerMinute = None,
    tokens_per_minute: options.PerMinute = None,
    max_concurrent: options.Concurrent = None,
    priority: options.Priority = 0,
) -> None:
    """Make a key, add its hash to a file, and print it: it cannot be shown again."""
    secret = add_key(
        file,
        name,
        requests_per_minute=requests_per_minute,
        tokens_per_minute=tokens_per_minute,
        max_concurrent=max_concurrent,
        priority=priority,
    )
    out.print(secret, markup=False)
