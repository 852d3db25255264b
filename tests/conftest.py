"""How tests are shared out, and what all of them start from."""

from __future__ import annotations

import os
from typing import Any

import pytest
import torch
from hypothesis import settings

import support.device  # noqa: F401 (before anybody imports Triton)

# One thread each: tests compare results, and several torch processes share two cores.
os.environ.setdefault("OMP_NUM_THREADS", "1")
torch.set_num_threads(1)

# `make test-long` looks at many examples, CI at some more than `make test`. No deadlines: two
# processes share the cores.
settings.register_profile("usual", deadline=None)
settings.register_profile("short", max_examples=300, deadline=None)
settings.register_profile("long", max_examples=3000, deadline=None)
settings.load_profile("usual")

# The folder whose tests share a Ray (its conftest.py), and the one whose modules start servers of
# their own. They take longest and come first.
SHARED_RAY, OWN_SERVERS = "tests/serve/", "tests/up/"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    def place(item: pytest.Item) -> int:
        starts = [item.nodeid.startswith(folder) for folder in (SHARED_RAY, OWN_SERVERS)]
        return starts.index(True) if any(starts) else len(starts)

    items.sort(key=place)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """One worker has all that shares a Ray; otherwise a module's tests stay together."""
    from xdist.scheduler import LoadScopeScheduling

    class ByFixtures(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            module = nodeid.partition("::")[0]
            return SHARED_RAY if module.startswith(SHARED_RAY) else module

    return ByFixtures(config, log)


@pytest.fixture(autouse=True)
def same_random_numbers() -> None:
    """Whichever tests the same worker has run before."""
    torch.manual_seed(0)
