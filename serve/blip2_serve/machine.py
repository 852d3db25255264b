"""The cores, the memory and the priority that this process has. Imports no torch.

On Linux, CPU affinity and control groups (versions 1 and 2) limit both: a container with a quota of
two cores has two, even on a machine with 64. On other systems there are no such limits.
"""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterator
from pathlib import Path

import psutil

CGROUPS = Path("/sys/fs/cgroup")
COMPUTE_NICENESS = 10  # a tenth of the others' share, if they want all that they can get
LARGEST_NICENESS = 19
OWN_CGROUPS = Path("/proc/self/cgroup")


def cores() -> int:
    """Whole cores that this process can keep busy: at least one.

    A fraction of a core does not count: if threads use up a quota, all of them stop for the rest
    of each period of 100 ms.
    """
    if hasattr(os, "sched_getaffinity"):
        allowed = len(os.sched_getaffinity(0))
    else:
        allowed = os.cpu_count() or 1
    return max(1, int(min([allowed, *_cpu_quotas()])))


def give_way() -> None:
    """Lowers the priority of this thread, and of those it will start, below its process's.

    Whoever computes on the cores that also serve should call it. Otherwise a request that only
    needs a word, such as a refusal, waits for the time slices of matrix products. Linux only:
    elsewhere threads have no priority of their own.
    """
    if sys.platform == "linux":
        niceness = os.getpriority(os.PRIO_PROCESS, os.getpid()) + COMPUTE_NICENESS
        os.setpriority(os.PRIO_PROCESS, 0, min(niceness, LARGEST_NICENESS))


def available_memory() -> int:
    """Bytes of main memory that this process can still allocate."""
    return max(0, min([int(psutil.virtual_memory().available), *_memory_left()]))


def anonymous_memory() -> int:
    """Bytes of memory that this process has allocated; on Linux, without mapped files."""
    memory = psutil.Process().memory_info()
    return int(memory.rss - getattr(memory, "shared", 0))


def _cpu_quotas() -> Iterator[float]:
    """Cores that each of this process's control groups allows."""
    for group in _groups("cpu"):
        with contextlib.suppress(OSError, ValueError):
            quota, period = map(int, (group / "cpu.max").read_text().split())
            yield quota / period  # no limit is "max", which is not a number
        with contextlib.suppress(OSError, ValueError):
            quota = int((group / "cpu.cfs_quota_us").read_text())
            if quota > 0:
                yield quota / int((group / "cpu.cfs_period_us").read_text())


def _memory_left() -> Iterator[int]:
    """Bytes that each of this process's control groups has left.

    Cached files count as used there, but the kernel drops them when memory is needed.
    """
    for group in _groups("memory"):
        for limit, usage, prefix in (
            ("memory.max", "memory.current", ""),
            ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_"),
        ):
            with contextlib.suppress(OSError, ValueError):
                most = int((group / limit).read_text())
                used = int((group / usage).read_text())
                lines = (group / "memory.stat").read_text().splitlines()
                stat = dict(line.split(maxsplit=1) for line in lines)
                files = (f"{prefix}active_file", f"{prefix}inactive_file")
                yield most - used + sum(int(stat.get(name, 0)) for name in files)


def _groups(controller: str) -> Iterator[Path]:
    """Folders of this process's control group and of its parents that may limit `controller`.

    Not all of them have to exist: a container may see its own group as the root, whatever the
    group's path outside is.
    """
    try:
        lines = OWN_CGROUPS.read_text().splitlines()
    except OSError:  # not Linux
        return
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers and controller not in controllers.split(","):
            continue
        root = CGROUPS / controllers  # version 2 has one tree and names no controllers
        own = root / path.strip("/")
        yield own
        yield from (group for group in own.parents if group.is_relative_to(root))
