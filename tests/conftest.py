"""How tests are distributed over workers, and the state they all start from."""

from __future__ import annotations

import os
from typing import Any

import pytest
import torch
from hypothesis import settings

import support.device  # noqa: F401 (must come before any import of Triton)

# One thread per process: several of them share two cores, and results must be comparable.
os.environ.setdefault("OMP_NUM_THREADS", "1")
torch.set_num_threads(1)

# `make test` uses the first profile, CI the second, `make test-long` the third. No deadlines, as
# two processes share the cores.
settings.register_profile("usual", deadline=None)
settings.register_profile("short", max_examples=300, deadline=None)
settings.register_profile("long", max_examples=3000, deadline=None)
settings.load_profile("usual")

# The tests of this folder share one Ray cluster (see its conftest.py); the modules of the other two
# start servers of their own. They take longest, so they start first.
SHARED_RAY = "tests/serve/"
FIRST = (SHARED_RAY, "tests/up/", "tests/docs/")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--changes",
        type=int,
        default=3,
        help="how often tests/chaos/test_changes.py changes an application under load",
    )


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    def place(item: pytest.Item) -> int:
        starts = [item.nodeid.startswith(folder) for folder in FIRST]
        return starts.index(True) if any(starts) else len(starts)

    items.sort(key=place)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """Gives all tests that share a Ray cluster to one worker, and each other module to one."""
    from xdist.scheduler import LoadScopeScheduling

    class ByFixtures(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            module = nodeid.partition("::")[0]
            return SHARED_RAY if module.startswith(SHARED_RAY) else module

    return ByFixtures(config, log)


@pytest.fixture(autouse=True)
def same_random_numbers() -> None:
    """Seeds torch, so that a test does not depend on those that ran before it."""
    torch.default_generator.manual_seed(0)  # torch.manual_seed takes milliseconds without a GPU
    if torch.cuda.is_available():
        torch.cuda.manual_seed_all(0)
