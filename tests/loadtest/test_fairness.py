"""The benchmark of fair shares, against servers of both kinds."""

from __future__ import annotations

import asyncio
from collections import Counter

import pytest
from aiohttp import web

from loadtest.bench.connections import Connections
from loadtest.bench.fairness import LOUD, together
from loadtest.bench.loops import TOKENS, Clients, Messages
from support import fake_server


@pytest.mark.parametrize("fair", [True, False])
async def test_it_tells_a_fair_server_from_one_that_takes_who_comes_first(fair: bool) -> None:
    """The server answers four requests at once; the fair one has a place for each tenant."""
    busy = Counter[str]()

    async def handle(request: web.Request) -> web.StreamResponse:
        await request.read()
        tenant = request.headers["authorization"] if fair else ""
        if busy[tenant] >= (1 if fair else 4):
            return web.Response(status=429, headers={"Retry-After": "0"})
        busy[tenant] += 1
        await asyncio.sleep(0.05)
        busy[tenant] -= 1
        return web.json_response(fake_server.whole(TOKENS))

    names = [LOUD, "one", "two", "three"]
    async with fake_server.serving(handle) as endpoint:
        connections = Connections(endpoint.url, 30)
        tenants = {name: Clients(Messages(endpoint, 0, name), connections) for name in names}
        rates = {name: 200.0 if name == LOUD else 3.0 for name in names}
        found = await together("a flood", tenants, rates, 3.0, 0)
        connections.close()

    asked = found.quiet.count + found.quiet_refused
    assert found.quiet_failed == 0
    assert asked > 15
    assert (found.quiet_refused < 0.3 * asked) is fair
    assert found.answered_per_s[LOUD] > 5
