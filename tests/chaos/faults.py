"""Faults of a running local server: its replicas' processes are killed or stopped.

Ray names the process of a replica `ray::ServeReplica:blip2:Generator`, with the name of the actor
before it while it loads. Only descendants of the given server are ever touched: other servers may
run on this machine.
"""

from __future__ import annotations

import contextlib
import random
import re
import signal
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import psutil

from blip2_serve.cli.running import APP_NAME
from support.server import wait_until
from tests.chaos.history import Fault, now

CONTROLLER = "ServeController"
STAGES = ("Preprocessor", "Encoder", "Generator")
STOPPED_S = 3.0

_TITLE = re.compile(rf"ray::(?:.*ServeReplica:{APP_NAME}:)?(\w+)")


@dataclass(frozen=True)
class Processes:
    """The processes of one server, by the pid of its `blip2-serve up`."""

    server: int

    def of(self, stage: str) -> list[psutil.Process]:
        """The replicas of a stage, or the controller; starting and stopped ones included."""
        found = []
        for process in psutil.Process(self.server).children(recursive=True):
            with contextlib.suppress(psutil.NoSuchProcess):
                title = _TITLE.match((process.cmdline() or [""])[0])
                if title and title[1] == stage and not is_gone(process):
                    found.append(process)
        return found

    def until_new(self, stage: str, known: Sequence[int], within_s: float = 120) -> psutil.Process:
        """Waits for a replica whose pid is not in `known`, and returns it while it loads."""
        new: list[psutil.Process] = []

        def came() -> bool:
            new[:] = [process for process in self.of(stage) if process.pid not in known]
            return bool(new)

        wait_until(came, within_s)
        return new[0]


@dataclass(frozen=True)
class Injector:
    """Injects faults and reports each to `record`; victims are drawn by `rng`."""

    processes: Processes
    record: Callable[[Fault], None]
    rng: random.Random

    def kill(self, stage: str) -> None:
        self._signal("kill", stage, self._victim(stage), signal.SIGKILL)

    def pause(self, stage: str) -> None:
        """Stops a replica for STOPPED_S seconds."""
        victim = self._victim(stage)
        self._signal("stop", stage, victim, signal.SIGSTOP)
        time.sleep(STOPPED_S)
        with contextlib.suppress(psutil.NoSuchProcess):  # the server may have replaced it
            self._signal("continue", stage, victim, signal.SIGCONT)

    def freeze(self, stage: str) -> None:
        """Stops a replica for good: it answers nothing, but its process lives."""
        self._signal("freeze", stage, self._victim(stage), signal.SIGSTOP)

    def kill_while_loading(self, stage: str) -> None:
        """Kills a replica, and then the one that takes its place as soon as it appears."""
        known = [process.pid for process in self.processes.of(stage)]
        self.kill(stage)
        self._signal("kill loading", stage, self.processes.until_new(stage, known), signal.SIGKILL)

    def kill_two(self, stage: str) -> None:
        """Kills replicas of this stage and of another one at once."""
        self.kill(stage)
        self.kill(self.rng.choice([other for other in STAGES if other != stage]))

    def _victim(self, stage: str) -> psutil.Process:
        return self.rng.choice(sorted(self.processes.of(stage), key=lambda p: p.pid))

    def _signal(self, kind: str, stage: str, victim: psutil.Process, how: signal.Signals) -> None:
        at = now()
        victim.send_signal(how)  # psutil checks that the pid is still this process's
        self.record(Fault(kind, stage, victim.pid, at))
        if how == signal.SIGKILL:
            wait_until(lambda: is_gone(victim), 30)


def is_gone(process: psutil.Process) -> bool:
    return _status(process) in (None, psutil.STATUS_ZOMBIE)


def is_stopped(process: psutil.Process) -> bool:
    return _status(process) == str(psutil.STATUS_STOPPED)


def _status(process: psutil.Process) -> str | None:
    """None: its pid is no longer there, or another process's."""
    try:
        return str(process.status()) if process.is_running() else None
    except psutil.NoSuchProcess:
        return None
