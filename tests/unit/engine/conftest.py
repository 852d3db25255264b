from __future__ import annotations

import pytest

from support.engine_bench import Bench


@pytest.fixture(params=[False, True], ids=["computed at once", "launched ahead"])
def devices(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs a test as on a CPU, and as on a GPU, which computes while the engine goes on."""
    monkeypatch.setattr(Bench, "asynchronous", request.param)
