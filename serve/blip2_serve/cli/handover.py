"""`load` and `bench`: hand over to the load tests and benchmarks of the repository."""

from __future__ import annotations

import importlib.util
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from blip2_serve.errors import StartupError

ROOT = Path(__file__).parents[3]  # of the repository, if this is an editable installation
INSTALL = "pip install -e '.[loadtest]'"


def repository() -> Path:
    """The folder that holds `loadtest`: where this package comes from, or the working directory.

    Raises:
        StartupError: there is none.
    """
    for folder in (ROOT, Path.cwd()):
        if (folder / "loadtest" / "locustfile.py").is_file():
            return folder
    raise StartupError(
        "load tests and benchmarks come with the repository, not with the package: run this in a "
        "clone of it"
    )


def load_command(scenario: str, url: str, output: Path, more: Sequence[str]) -> list[str]:
    """What runs a scenario, as `make load` does; `more` are options of locust's or the scenario's.

    Raises:
        StartupError: there is no such scenario, or something is missing.
    """
    folder = repository() / "loadtest"
    _need("locust")
    known = sorted(file.stem for file in (folder / "scenarios").glob("*.yaml"))
    if scenario not in known and not Path(scenario).is_file():
        raise StartupError(f"there is no scenario {scenario!r}; there are: {', '.join(known)}")
    own = ["--scenario", scenario, "--output", str(output)]
    file = str(folder / "locustfile.py")
    return ["-m", "locust", "-f", file, "--headless", "--only-summary", "-H", url, *own, *more]


def bench_command(name: str | None, more: Sequence[str]) -> list[str]:
    """What runs a benchmark by its name; `more` are its own options.

    Raises:
        StartupError: there is no such benchmark, or something is missing.
    """
    known = benchmarks(repository())
    if name not in known:
        listed = "\n".join(f"  {each:16} {about}" for each, about in known.items())
        unknown = f"there is no benchmark {name!r}" if name else "name a benchmark"
        raise StartupError(f"{unknown}; there are:\n{listed}")
    _need("aiohttp")
    return ["-m", f"loadtest.bench.{name}", *more]


def benchmarks(root: Path) -> dict[str, str]:
    """The modules of `loadtest.bench` that are commands, each with the first line it says."""
    found = {}
    for file in sorted((root / "loadtest" / "bench").glob("*.py")):
        text = file.read_text(encoding="utf-8")
        if '__name__ == "__main__"' in text:
            found[file.stem] = text.removeprefix('"""').partition("\n")[0]
    return found


def hand_over(command: Sequence[str], environment: Mapping[str, str] = os.environ) -> None:
    """Becomes the command, run by this Python, which finds the repository's modules."""
    path = os.pathsep.join(filter(None, [str(repository()), environment.get("PYTHONPATH")]))
    own = {**environment, "PYTHONPATH": path}
    os.execve(sys.executable, [sys.executable, *command], own)  # noqa: S606 (no shell)


def _need(module: str) -> None:
    if importlib.util.find_spec(module) is None:
        raise StartupError(f"{module} is not installed; in the repository: {INSTALL}")
