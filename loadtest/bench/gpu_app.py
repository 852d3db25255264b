"""Measures the whole application on one GPU, beside two bare processes that do the same work.

    PYTHONPATH=serve python -m loadtest.bench.gpu_app [--output gpu_app.json]
    PYTHONPATH=serve python -m loadtest.bench.gpu_app --device cpu --shape small

The second line only shows, in a minute or two, that the script runs. It needs what the server
needs, and aiohttp.

Writes a checkpoint with random weights (blip2-opt-2.7b-coco at 364 x 364, bfloat16), starts
`blip2-serve up`, and lets users ask for captions of 16 tokens of 640 x 480 JPEGs, each
again as soon as it is answered, whole and streamed. The server has its caches as by default, but
every picture is new to them. Then one process encodes the same pictures, decoded in advance, and
another generates. A window opens once each user had an answer. Means of steps, batches and queues
come from the server's /metrics and are of the whole load, from its first request to its last.

With --kill, the generator's replica is killed under load last. Exits with 1 if a request failed
before that, or if, in float32, an answer differs from that of the bare processes.
"""

from __future__ import annotations

import argparse
import contextlib
import multiprocessing
import os
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import httpx
import numpy as np
from numpy.typing import NDArray

from blip2_serve.model.processor import ImageProcessor
from loadtest.bench import script, servers
from loadtest.bench.gpu_bare import Bare, BareFailed
from loadtest.bench.gpu_clients import Clients, ClientsFailed, Span
from loadtest.bench.gpu_report import Row, asked, head, lines, row_of
from loadtest.bench.gpu_server import QUICK_METRICS, Meters, Size, configuration, usage
from loadtest.bench.servers import Endpoint, ServerFailed
from loadtest.bench.workload import Request, data_url, picture
from loadtest.results import machine, write_json

SETTINGS = ("device", "shape", "dtype", "encoder_quantize", "seconds")
TOKENS = 16
CHECKED = 8  # answers that are compared
CHECKPOINT_BYTES = {"full": 8e9, "medium": 3e8, "small": 1e7}
MOST_CLIENTS = 4  # processes
SHORT_S = 4.0  # a window of one user
KILL_USERS, KILL_AFTER_S, AGAIN_WITHIN_S, AGAIN_S = 64, 1.0, 90.0, 2.0


def main() -> None:
    args = arguments()
    with script.one_line_failures():
        failed = measure(args)
    sys.exit(failed)


def arguments() -> argparse.Namespace:
    parser = script.parser(__doc__)
    gpu = Path("/dev/nvidiactl").exists()
    parser.add_argument("--device", default="cuda" if gpu else "cpu")
    parser.add_argument("--shape", choices=[*CHECKPOINT_BYTES], help="by default full on a GPU")
    parser.add_argument("--dtype", help="by default bfloat16, or float32 if small")
    parser.add_argument("--encoder-quantize", choices=["fp8"])
    parser.add_argument("--users", type=int, nargs="+", help="by default 1 8 64 256, or 1 8")
    parser.add_argument("--seconds", type=float, default=8, help="of a window")
    parser.add_argument("--pictures", type=int, help="in stock; by default 512, or 64")
    parser.add_argument("--kill", action=argparse.BooleanOptionalAction, help="default on a GPU")
    parser.add_argument(
        "--folder", type=Path, help="for the checkpoint; by default /dev/shm or /tmp"
    )
    parser.add_argument("--ready-within", type=float, default=240, help="seconds, of the server")
    parser.add_argument("--output", type=Path, help="JSON file; the server's log goes beside it")
    many = servers_size(os.cpu_count() or 1)
    for name, value in vars(many).items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=int, default=value)
    args = parser.parse_args()
    args.gpu = args.device.startswith("cuda")
    args.shape = args.shape or ("full" if args.gpu else "small")
    full = args.shape == "full"
    args.dtype = args.dtype or ("bfloat16" if full else "float32")
    args.users = args.users or ([1, 8, 64, 256] if full else [1, 8])
    args.pictures = args.pictures or (512 if full else 64)
    args.kill = args.gpu if args.kill is None else args.kill
    args.size = Size(**{name: getattr(args, name) for name in vars(many)})
    return args


def servers_size(cores: int) -> Size:
    return Size() if cores >= 8 else Size(ingress=1, preprocessors=1, max_num_batched_tokens=512)


class Run:
    """What all phases share; the report is written after each of them."""

    def __init__(self, args: argparse.Namespace, folder: Path) -> None:
        self.args = args
        self.checkpoint = folder / "checkpoint"
        self.pixels = folder / "pixels.npy"  # uint8 [pictures, 3, S, S]
        self.config_file = folder / "config.json"  # JSON is YAML
        self.log = args.output.with_suffix(".server.log") if args.output else folder / "server.log"
        self.config = configuration(
            str(self.checkpoint), args.device, args.dtype, args.size, args.encoder_quantize
        )
        self.client_processes = min(MOST_CLIENTS, max(1, (os.cpu_count() or 1) // 4))
        self.report: dict[str, Any] = {
            "machine": machine(),
            **{name: getattr(args, name) for name in SETTINGS},
            "size": vars(args.size),
            "phases": {},  # seconds
            "failed": [],
            "loads": [],
        }

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        start = time.perf_counter()
        try:
            yield
        finally:
            self.took(name, start)

    def took(self, name: str, start: float) -> None:
        self.report["phases"][name] = seconds = round(time.perf_counter() - start, 1)
        print(f"[{seconds:5.1f} s] {name}", flush=True)
        if self.args.output:
            write_json(self.args.output, self.report)

    def window_s(self, users: int) -> float:
        seconds: float = self.args.seconds
        return min(seconds, SHORT_S) if users == 1 else seconds

    def add(self, row: Row) -> None:
        print(lines(row))
        self.report["loads"].append(row)

    def failed(self, reason: str) -> None:
        print(f"FAILED: {reason}", flush=True)
        self.report["failed"].append(reason)


def measure(args: argparse.Namespace) -> bool:
    """Runs all phases. Returns whether anything failed."""
    start = time.perf_counter()
    with tempfile.TemporaryDirectory(
        prefix="gpu-app-", dir=args.folder or room(args.shape)
    ) as name:
        run = Run(args, Path(name))
        with run.phase("checkpoint"), processes(1) as pool:
            made = pool.submit(make_checkpoint, run.checkpoint, args.shape, args.device).result()
            run.report |= made
        print(", ".join([*made.values(), f"{os.cpu_count()} cores", args.shape, args.dtype]))
        if not args.gpu:
            print("NOT A GPU: the figures only show that the script runs")
        with run.phase("pictures"):
            pictures = draw_pictures(run)
        try:
            measure_app(run, pictures)
        except ServerFailed as error:
            run.failed(str(error))  # with the end of its log
        except (ClientsFailed, httpx.HTTPError) as error:
            run.failed(f"{error!r}; {servers.tail(run.log)}")
        measure_bare(run)
        run.report["asked"] = asked(run.report["loads"])
        for row in run.report["asked"]:
            verdict = "met" if row["met"] else "missed"
            print(f"{row['what']}: {row['is']:.3g} (asked {row['asked']}): {verdict}")
        run.took("all", start)
    return bool(run.report["failed"])


# -- checkpoint and pictures -----------------------------------------------------------------------


def processes(most: int) -> ProcessPoolExecutor:
    """Fresh processes: they leave nothing on the GPU, and know nothing of this one's threads."""
    return ProcessPoolExecutor(most, multiprocessing.get_context("spawn"))


def room(shape: str) -> str | None:
    """Where to write the checkpoint; None: where temporary files go."""
    memory = Path("/dev/shm")  # noqa: S108 (the folder in it has a random name)
    if memory.is_dir() and shutil.disk_usage(memory).free > 3 * CHECKPOINT_BYTES[shape]:
        return str(memory)
    return None


def make_checkpoint(folder: Path, shape: str, device: str) -> dict[str, str]:
    """Writes it, and returns what computed it."""
    import torch
    import transformers

    from loadtest.bench.checkpoint import write_checkpoint

    transformers.utils.logging.disable_progress_bar()
    write_checkpoint(folder, shape, device, torch.bfloat16)
    gpu = device.startswith("cuda")
    return {
        "gpu": torch.cuda.get_device_name(device) if gpu else "CPU",
        "torch": f"torch {torch.__version__}",
        "transformers": f"transformers {transformers.__version__}",
    }


def draw_pictures(run: Run) -> list[bytes]:
    """JPEG files. Their pixels go to `run.pixels`."""
    numbers = range(run.args.pictures)
    with processes(max(1, (os.cpu_count() or 1) - 1)) as pool:
        drawn = list(pool.map(partial(draw, run.checkpoint), numbers, chunksize=8))
    np.save(run.pixels, np.stack([pixels for _, pixels in drawn]))
    return [jpeg for jpeg, _ in drawn]


def draw(checkpoint: Path, number: int) -> tuple[bytes, NDArray[np.uint8]]:
    jpeg = picture(np.random.default_rng(number))
    return jpeg, ImageProcessor.load(checkpoint).pixels(jpeg)


# -- the application -------------------------------------------------------------------------------


def measure_app(run: Run, pictures: list[bytes]) -> None:
    """Starts the server, keeps some answers to compare, measures all loads, and stops it.

    Raises:
        ServerFailed, ClientsFailed
    """
    write_json(run.config_file, run.config.model_dump(mode="json", exclude_unset=True))
    port = servers.free_port()
    command = [sys.executable, "-m", "blip2_serve", "up", "--port", str(port)]
    command += ["--config", str(run.config_file)]
    # Ray's workers may run in another folder.
    path = os.pathsep.join(map(os.path.abspath, filter(None, sys.path)))
    variables = {**QUICK_METRICS, "PYTHONPATH": path}
    with contextlib.ExitStack() as stack:
        with run.phase("server starts"):
            starting = servers.started(command, port, run.log, variables, run.args.ready_within)
            endpoint = stack.enter_context(starting)
        clients = Clients(endpoint, pictures, TOKENS, run.client_processes)
        stack.enter_context(clients)
        meters = Meters(endpoint.url)
        with run.phase("answers, one by one"):
            run.report["app_answers"] = [answer_of(endpoint, p) for p in pictures[:CHECKED]]
            meters.take(images=CHECKED, tokens=CHECKED * TOKENS)
        print(head())
        for stream in (False, True):
            for users in run.args.users:
                with run.phase(f"app, {users} users{', streamed' if stream else ''}"):
                    app_load(run, endpoint, clients, meters, users, stream)
        if run.args.kill:
            with run.phase("kill"):
                run.report["kill"] = kill_generator(endpoint, clients)
                print(run.report["kill"])
        with run.phase("server stops"):
            stack.close()


def answer_of(endpoint: Endpoint, jpeg: bytes) -> dict[str, Any]:
    body = Request("", data_url(jpeg), TOKENS, more={"return_token_ids": True})
    answer = httpx.post(
        f"{endpoint.url}/chat/completions",
        json=body.body(endpoint.model, stream=False),
        timeout=60,
        trust_env=False,
    )
    (choice,) = answer.raise_for_status().json()["choices"]
    return {"token_ids": choice["token_ids"], "text": choice["message"]["content"]}


def app_load(
    run: Run, endpoint: Endpoint, clients: Clients, meters: Meters, users: int, stream: bool
) -> None:
    clients.start(users, stream=stream)
    opened = time.perf_counter()
    span = Span(opened, opened + run.window_s(users))
    clients.tell(span)
    with usage(partial(servers.cpu_seconds, endpoint.process)) as used:
        time.sleep(span.closed - time.perf_counter())
    outcome = clients.finish(span)
    answers = len(outcome.answers)
    run.add(
        {
            **row_of("app", users, stream, outcome.window(span), used),
            "client_cores": outcome.cpu_s / (span.closed - span.opened),
            "failures": dict(outcome.failures),
            "means": meters.take(images=answers, tokens=TOKENS * answers),
        }
    )
    if outcome.failures:
        run.failed(f"{sum(outcome.failures.values())} requests: {dict(outcome.failures)}")


def kill_generator(endpoint: Endpoint, clients: Clients) -> dict[str, Any]:
    """Kills the generator's replica; tells what was lost and when answers came again."""
    clients.start(KILL_USERS, stream=False)
    time.sleep(KILL_AFTER_S)
    running = servers.cpu_seconds(endpoint.process)
    (pid,) = [pid for pid, name in running if name.endswith(":Generator")]
    killed = time.perf_counter()
    os.kill(pid, signal.SIGKILL)
    clients.tell(Span(killed, float("inf")))
    with contextlib.suppress(ClientsFailed):
        clients.wait_for_answer(AGAIN_WITHIN_S)
    span = Span(killed, time.perf_counter() + AGAIN_S)
    clients.tell(span)
    outcome = clients.finish(span)
    later = [answer.ended for answer in outcome.answers if answer.started > killed]
    return {
        "users": KILL_USERS,
        "lost": sum(outcome.failures.values()),
        "reasons": dict(outcome.failures),
        "answers_again_after_s": min(later) - killed if later else None,
    }


# -- the two bare processes ------------------------------------------------------------------------


def measure_bare(run: Run) -> None:
    """Starts them, compares their answers with the server's, measures all loads, ends them."""
    try:
        with contextlib.ExitStack() as stack:
            with run.phase("bare processes start"):
                bare = stack.enter_context(Bare(run.config, run.pixels, run.args.pictures, TOKENS))
            with run.phase("answers of theirs"):
                ours = [bare.answer(number) for number in range(CHECKED)]
                compare(run, [{"token_ids": [*a.token_ids], "text": a.text} for a in ours])
            for users in run.args.users:
                with run.phase(f"bare, {users} users"):
                    bare.start(users)
                    opened = time.perf_counter()
                    closed = opened + run.window_s(users)
                    with usage(bare.cpu_seconds) as used:
                        bare.go_on_until(closed)
                    window = bare.finish(opened, closed)
                    run.add(row_of("bare", users, False, window, used))
    except BareFailed as error:
        run.failed(f"bare: {error}")


def compare(run: Run, bare: list[dict[str, Any]]) -> None:
    app = run.report.get("app_answers", [])
    equal = sum(a == b for a, b in zip(app, bare, strict=False))
    different = len({tuple(answer["token_ids"]) for answer in bare})
    run.report |= {"bare_answers": bare, "equal_answers": equal}
    print(f"{equal} of {len(app)} answers are the bare processes', which gave {different} texts")
    if run.args.dtype == "float32" and app and equal < CHECKED:
        run.failed("in float32 all answers must be equal")


if __name__ == "__main__":
    main()
