"""For `gpu_app.py`: the same work in two bare processes, the least that serving could take.

One encodes whatever waits, the other runs the engine, and queues join them and the parent, as in
the server: a GPU's worth of work without Ray, HTTP, JSON or the decoding of JPEGs.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import queue
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from blip2_serve import environment
from blip2_serve.config import AppConfig
from loadtest.bench.client import Answer, Window
from loadtest.bench.gpu_server import CpuSeconds

READY_WITHIN_S, ANSWER_WITHIN_S, POLL_S = 200, 60, 1.0

READY = "ready"


class BareFailed(Exception):
    """One of the two processes has ended, or was too slow."""


@dataclass(frozen=True)
class Answered:
    """A finished answer; `request` is the number that the parent gave it."""

    request: int
    token_ids: tuple[int, ...]
    text: str


def encoder(*arguments: Any) -> None:
    _as_replica()
    from loadtest.bench.gpu_bare_stages import encode

    encode(*arguments)


def generator(*arguments: Any) -> None:
    _as_replica()
    from loadtest.bench.gpu_bare_stages import generate

    generate(*arguments)


def _as_replica() -> None:
    """Threads of a CPU wait for each other as in the server; must run before torch is loaded."""
    os.environ.update(environment.REPLICA)
    environment.prepare_replica()


class Bare:
    """Both processes. Entering loads them; `pixels_file` holds the pictures that they know."""

    def __init__(self, config: AppConfig, pixels_file: Path, pictures: int, tokens: int) -> None:
        context = multiprocessing.get_context("spawn")
        self._pictures, self._tokens = pictures, tokens
        self._inbox, self._features, self._results = (context.Queue() for _ in range(3))
        self._next = 0
        self._started: dict[int, float] = {}  # requests under way
        self._answers: list[Answer] = []
        self._processes = {
            "encoder": context.Process(
                target=encoder,
                args=(config, pixels_file, self._inbox, self._features, self._results),
                daemon=True,
            ),
            "generator": context.Process(
                target=generator, args=(config, tokens, self._features, self._results), daemon=True
            ),
        }

    def __enter__(self) -> Bare:
        for process in self._processes.values():
            process.start()
        try:
            for _ in self._processes:
                self._result(READY_WITHIN_S)
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        for process in self._processes.values():
            process.kill()
            process.join()
        self._inbox.cancel_join_thread()  # nobody will read the rest

    def answer(self, picture: int) -> Answered:
        """One answer, while nothing else is under way."""
        self._ask(picture)
        return self._take()

    def start(self, users: int) -> None:
        """Lets so many users ask, each anew as soon as it is answered; returns when all were."""
        self._answers = []
        asked = [self._ask() for _ in range(users)]
        while min(self._started) <= asked[-1]:
            self._go_on()

    def go_on_until(self, closed: float) -> None:
        """Until this time of `time.perf_counter`, or the first answer after it."""
        while time.perf_counter() < closed:
            self._go_on()

    def finish(self, opened: float, closed: float) -> Window:
        """Goes on until all that was asked before `closed` is answered, then waits for the rest."""
        while min(self._started.values()) < closed:
            self._go_on()
        while self._started:
            self._take()
        return Window(opened, closed, self._answers)

    def cpu_seconds(self) -> CpuSeconds:
        """Of both processes and this one, so far."""
        pids = {name: process.pid for name, process in self._processes.items()}
        found = {}
        for name, pid in {**pids, "asking": None}.items():
            times = psutil.Process(pid).cpu_times()
            found[pid or 0, name] = times.user + times.system
        return found

    def _go_on(self) -> None:
        self._take()
        self._ask()

    def _ask(self, picture: int | None = None) -> int:
        number = self._next
        self._next += 1
        self._started[number] = time.perf_counter()
        self._inbox.put((number, number % self._pictures if picture is None else picture))
        return number

    def _take(self) -> Answered:
        answered: Answered = self._result(ANSWER_WITHIN_S)
        ended = time.perf_counter()
        assert len(answered.token_ids) == self._tokens
        self._answers.append(Answer(self._started.pop(answered.request), ended, self._tokens))
        return answered

    def _result(self, within_s: float) -> Any:
        deadline = time.monotonic() + within_s
        while time.monotonic() < deadline:
            with contextlib.suppress(queue.Empty):
                return self._results.get(timeout=POLL_S)
            for name, process in self._processes.items():
                if not process.is_alive():
                    raise BareFailed(f"the {name} process ended with {process.exitcode}")
        raise BareFailed(f"nothing came within {within_s:g} s")
