"""Faults hit the processes they name, and nothing outside the given server."""

from __future__ import annotations

import os
import random
import signal
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager

import psutil
import pytest

from support.server import wait_until
from tests.chaos.faults import Injector, Processes, is_gone, is_stopped
from tests.chaos.history import Fault
from tests.chaos.run import FAULTS, inject, plan

# Starts a process again whenever it ends, as Ray Serve does.
KEEP = 'while true; do bash -c \'exec -a "$0" sleep 300\' "$0"; done'
QUOTED = KEEP.replace("'", "'\\''")
TITLE = "ray::ServeReplica:blip2:{}"


@contextmanager
def server(*titles: str) -> Iterator[Processes]:
    """A process whose descendants have these titles, and are replaced when they die."""
    keepers = " & ".join(f"bash -c '{QUOTED}' '{title}'" for title in titles)
    process = psutil.Popen(
        ["bash", "-c", f"{keepers} & wait"], stderr=subprocess.DEVNULL, start_new_session=True
    )
    try:
        found = Processes(process.pid)
        wait_until(lambda: len(named(found, *titles)) >= len(titles), 30)
        yield found
    finally:
        # All at once, or a parent could replace a child that nobody knows yet.
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def named(processes: Processes, *titles: str) -> list[psutil.Process]:
    children = psutil.Process(processes.server).children(recursive=True)
    return [child for child in children if (child.cmdline() or [""])[0] in titles]


def injector(processes: Processes) -> tuple[Injector, list[Fault]]:
    found: list[Fault] = []
    return Injector(processes, found.append, random.Random(1)), found


def stage_titles(*stages: str) -> list[str]:
    return [TITLE.format(stage) for stage in stages]


def test_only_replicas_of_the_stage_and_of_this_server_are_found() -> None:
    titles = [*stage_titles("Generator", "Generator", "Encoder"), "ray::ServeController"]
    with server(*titles) as own, server(*stage_titles("Generator")) as other:
        for stage, count in (("Generator", 2), ("Encoder", 1), ("ServeController", 1), ("Gen", 0)):
            assert len(own.of(stage)) == count
        assert len(other.of("Generator")) == 1
        assert not {p.pid for p in own.of("Generator")} & {p.pid for p in other.of("Generator")}


@pytest.mark.parametrize(
    "title",
    [
        TITLE.format("Generator.handle_request"),
        "ray::SERVE_REPLICA::blip2#Generator#rd5yqxb8:ServeReplica:blip2:Generator.__init__",
    ],
)
def test_a_title_that_names_the_running_method_counts(title: str) -> None:
    with server(title) as own:
        assert len(own.of("Generator")) == 1


def test_killing_replaces_one_replica_and_reports_it() -> None:
    with server(*stage_titles("Generator", "Generator", "Encoder")) as own:
        before = {p.pid: p for p in own.of("Generator")}
        others = own.of("Encoder")
        hits, found = injector(own)
        hits.kill("Generator")
        (fault,) = found
        assert (fault.kind, fault.stage) == ("kill", "Generator")
        assert is_gone(before.pop(fault.pid))
        assert not any(map(is_gone, [*before.values(), *others]))
        assert own.until_new("Generator", [*before, fault.pid], 30).pid not in before


def test_killing_while_loading_hits_the_replacement_too() -> None:
    with server(*stage_titles("Encoder")) as own:
        hits, found = injector(own)
        hits.kill_while_loading("Encoder")
        assert [fault.kind for fault in found] == ["kill", "kill loading"]
        assert found[0].pid != found[1].pid


def test_killing_two_hits_two_stages() -> None:
    with server(*stage_titles("Preprocessor", "Encoder", "Generator")) as own:
        hits, found = injector(own)
        hits.kill_two("Encoder")
        stages = [fault.stage for fault in found]
        assert stages[0] == "Encoder"
        assert stages[1] in ("Preprocessor", "Generator")


def test_a_pause_ends_and_a_freeze_does_not(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tests.chaos.faults.STOPPED_S", 0.1)
    with server(*stage_titles("Encoder")) as own:
        (victim,) = own.of("Encoder")
        hits, found = injector(own)
        hits.pause("Encoder")
        wait_until(lambda: not is_stopped(victim), 10)
        hits.freeze("Encoder")
        wait_until(lambda: is_stopped(victim), 10)
        assert [fault.kind for fault in found] == ["stop", "continue", "freeze"]


def test_a_plan_has_every_fault_before_it_repeats_one() -> None:
    plans = [list(plan(40, random.Random(seed))) for seed in (1, 1, 2)]
    assert plans[0] == plans[1] != plans[2]
    assert len({*plans[0][:17]}) == 17  # five kinds for three stages, ingress, controller
    assert {kind for kind, _ in plans[0][:17]} == {*FAULTS}
    assert {stage for kind, stage in plans[0] if kind == "ingress"} == {"Ingress"}


def test_every_kind_of_the_plan_is_a_fault(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tests.chaos.faults.STOPPED_S", 0.1)
    titles = stage_titles("Preprocessor", "Encoder", "Generator", "Ingress")
    with server(*titles, "ray::ServeController") as own:
        hits, found = injector(own)
        for kind in FAULTS:
            stage = {"ingress": "Ingress", "controller": "ServeController"}.get(kind, "Encoder")
            own.until_new(stage, [p.pid for p in own.of(stage) if is_stopped(p)], 30)
            inject(hits, kind, stage)
            assert found[0].stage == stage
            found.clear()
