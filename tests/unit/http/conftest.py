"""A fake backend and a client of the routes over it."""

from __future__ import annotations

from collections.abc import AsyncIterator

import httpx
import pytest

from support.fake_backend import FakeBackend, client_of


@pytest.fixture
def backend() -> FakeBackend:
    return FakeBackend()


@pytest.fixture
async def client(backend: FakeBackend) -> AsyncIterator[httpx.AsyncClient]:
    async with client_of(backend) as client:
        yield client
