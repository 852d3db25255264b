"""How much memory there is, and how much this process has. Linux; imports no torch."""

from __future__ import annotations

from pathlib import Path

_CGROUP = Path("/sys/fs/cgroup")


def rss_anon() -> int:
    """Bytes of anonymous memory of this process: what it has allocated, without mapped files."""
    return _kib_field(Path("/proc/self/status"), "RssAnon")


def available() -> int:
    """Bytes of main memory that can still be had, within the container's limit if there is one."""
    free = _kib_field(Path("/proc/meminfo"), "MemAvailable")
    try:
        limit = int((_CGROUP / "memory.max").read_text())
        used = int((_CGROUP / "memory.current").read_text())
    except (OSError, ValueError):  # no cgroup v2 here, or "max": no limit
        return free
    return min(free, max(0, limit - used))


def _kib_field(path: Path, name: str) -> int:
    for line in path.read_text().splitlines():
        if line.startswith(f"{name}:"):
            return int(line.split()[1]) * 1024
    raise OSError(f"{path} has no {name}")
