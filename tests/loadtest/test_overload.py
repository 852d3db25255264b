"""The overload benchmark's figures, on outcomes and against servers that refuse."""

from __future__ import annotations

import asyncio
import hashlib
import itertools
import random
from argparse import Namespace
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from aiohttp import web

from loadtest.bench import loops, overload, overload_figures, script
from loadtest.bench.connections import Connections, NoAnswer, parse
from loadtest.bench.loops import TOKENS, Clients, Messages, Outcome
from loadtest.bench.servers import Endpoint
from loadtest.results import read_json
from support import fake_server
from support.fake_server import Handler


def outcome(due: float, latency: float, status: int = 200, **more: Any) -> Outcome:
    values = {"request": 0, "tries": 1, "sent": due, **more}
    return Outcome(due=due, ended=due + latency, status=status, **values)


def clients(endpoint: Endpoint, timeout_s: float = 30) -> Clients:
    return Clients(Messages(endpoint, 0), Connections(endpoint.url, timeout_s))


async def ask(endpoint: Endpoint, timeout_s: float = 30) -> Outcome:
    found = clients(endpoint, timeout_s)
    return await found.ask(found.new())


class Desk:
    """Answers `places` requests at once, each after `work_s`, and refuses the others."""

    def __init__(self, places: int, work_s: float, refusals: int = 0) -> None:
        self.seen: Counter[bytes] = Counter()
        self.statuses: Counter[int] = Counter()
        self._places, self._work_s, self._refusals = places, work_s, refusals
        self._busy = 0

    async def handle(self, request: web.Request) -> web.StreamResponse:
        name = hashlib.sha256(await request.read()).digest()
        self.seen[name] += 1
        if self._busy >= self._places or self.seen[name] <= self._refusals:
            self.statuses[429] += 1
            return web.Response(status=429, headers={"Retry-After": "0"})
        self._busy += 1
        try:
            await asyncio.sleep(self._work_s)
        finally:
            self._busy -= 1
        self.statuses[200] += 1
        return web.json_response(fake_server.whole(TOKENS))


def answering(**response: Any) -> Handler:
    async def handle(request: web.Request) -> web.StreamResponse:
        await request.read()
        return web.json_response(**response)

    return handle


# -- figures ---------------------------------------------------------------------------------------


def test_goodput_counts_right_answers_inside_the_window() -> None:
    outcomes = [
        *(outcome(float(second), 0.5) for second in range(10)),
        outcome(9.0, 5.0),  # answered after the window
        outcome(1.0, 0.1, failure="wrong answer"),
        outcome(1.0, 0.1, 500, failure="status 500"),
        outcome(1.0, 60.0, 0, failure="timeout"),
    ]
    found = overload_figures.open_load(outcomes, 0.0, 10.0, 2.0, 5, 0.1)

    assert (found.offered_per_s, found.answered_per_s, found.goodput) == (1.4, 1.0, 0.5)
    assert found.accepted.count == 11
    assert found.accepted.p50_s == pytest.approx(0.5)
    assert found.failures == {"wrong answer": 1, "status 500": 1, "timeout": 1}
    assert found.refused.count == 0
    assert found.told_when is None


def test_refusals_are_counted_by_status_with_their_latency_and_advice() -> None:
    outcomes = [
        outcome(0.0, 0.010, 429, retry_after_s=3.0),
        outcome(0.0, 0.020, 429, retry_after_s=0.0),
        outcome(0.0, 0.030, 503),
        outcome(0.0, 0.040, 429, retry_after_s=1.0),
    ]
    found = overload_figures.open_load(outcomes, 0.0, 1.0, 1.0, 10, 0.1)

    assert found.refusals == {"429": 3, "503": 1}
    assert found.told_when == 0.75
    assert found.refused.p50_s == pytest.approx(0.025)
    assert found.refused.p99_s == pytest.approx(0.0397)
    assert not found.failures


def test_a_late_sender_is_reported_and_its_lateness_counts_as_latency() -> None:
    outcomes = [outcome(0.0, 0.9, sent=0.8), outcome(1.0, 0.1, sent=1.001)]
    found = overload_figures.open_load(outcomes, 0.0, 2.0, 1.0, 5, 0.1)

    assert found.accepted.p99_s == pytest.approx(0.892)
    assert (found.sent_late, found.late_max_s) == (1, 0.8)
    assert "FELL BEHIND at 5 x plateau: 1 requests" in overload_figures.lateness([found])
    assert "the latest by 0.80 s" in overload_figures.lateness([found])
    assert "within 50 ms" in overload_figures.lateness([])


def test_obedience_is_the_share_admitted_at_the_first_retry() -> None:
    refused: dict[str, Any] = {"status": 429, "retry_after_s": 1.0}
    outcomes = [
        outcome(1.0, 0.1, request=1, **refused),
        outcome(2.1, 0.5, request=1, tries=2),  # admitted
        outcome(1.0, 0.1, request=2, **refused),
        outcome(2.1, 0.1, request=2, tries=2, **refused),  # refused again
        outcome(3.2, 0.1, request=2, tries=3),
        outcome(1.0, 0.1, request=3, **refused),  # still waiting at the end
        outcome(1.0, 0.1, 503, request=4),  # was not told when
        outcome(2.0, 0.1, request=4, tries=2),
        outcome(0.5, 0.1, request=5, **refused),  # before the window
        outcome(1.5, 0.1, request=5, tries=2),
    ]
    found = overload_figures.obedience(outcomes, 3, opened=1.0, seconds=10.0)

    assert (found.refused, found.admitted, found.admitted_share) == (2, 1, 0.5)
    assert found.without_retry_after == 1
    assert "50.0% of 2 refused" in overload_figures.admitted(found)


# -- requests --------------------------------------------------------------------------------------


async def test_every_request_is_whole_and_about_another_picture() -> None:
    pictures = set()

    async def handle(request: web.Request) -> web.StreamResponse:
        body = await request.json()
        (image, _) = body["messages"][0]["content"]
        pictures.add(image["image_url"]["url"])
        assert (body["model"], body["max_tokens"]) == ("m", TOKENS)
        return web.json_response(fake_server.whole(TOKENS))

    async with fake_server.serving(handle) as endpoint:
        found = clients(endpoint)
        outcomes = [await found.ask(found.new()) for _ in range(2 * loops.PICTURES)]

    assert all(o.is_answered for o in outcomes)
    assert len(pictures) == 2 * loops.PICTURES


def test_two_runs_send_different_pictures() -> None:
    endpoint = Endpoint("http://127.0.0.1:1/v1", "m")
    first, second = (Messages(endpoint, 0).message(0) for _ in range(2))
    assert len(first) == len(second)
    assert first != second


@pytest.mark.parametrize(
    ("response", "failure"),
    [
        ({"data": fake_server.whole(TOKENS - 1)}, "wrong answer"),
        ({"data": "no object"}, "wrong answer"),
        ({"data": {}, "status": 500}, "status 500"),
        ({"data": {}, "status": 408}, "status 408"),
    ],
)
async def test_a_wrong_answer_is_a_failure_of_its_kind(
    response: dict[str, Any], failure: str
) -> None:
    async with fake_server.serving(answering(**response)) as endpoint:
        found = await ask(endpoint)
    assert (found.failure, found.is_answered, found.is_refused) == (failure, False, False)


@pytest.mark.parametrize(
    ("header", "seconds"), [("7", 7.0), ("0", 0.0), ("-1", None), ("soon", None), (None, None)]
)
async def test_retry_after_is_read_as_seconds(header: str | None, seconds: float | None) -> None:
    headers = {"Retry-After": header} if header else {}
    async with fake_server.serving(answering(status=429, headers=headers)) as endpoint:
        found = await ask(endpoint)
    assert found.is_refused
    assert found.retry_after_s == seconds


async def test_lost_connections_are_failures_of_their_kinds() -> None:
    async def vanish(request: web.Request) -> web.StreamResponse:
        assert request.transport is not None
        request.transport.close()
        return web.Response()

    async def cut(request: web.Request) -> web.StreamResponse:
        response = web.StreamResponse(headers={"Content-Length": "100"})
        await response.prepare(request)
        await response.write(b"{")
        assert request.transport is not None
        request.transport.close()
        return response

    ended = asyncio.Event()  # the server waits for its handlers

    async def wait(_: web.Request) -> web.StreamResponse:
        await ended.wait()
        return web.Response()

    async with fake_server.serving(vanish) as endpoint:
        assert (await ask(endpoint)).failure == "closed without an answer"
    async with fake_server.serving(cut) as endpoint:
        assert (await ask(endpoint)).failure == "cut answer"
    async with fake_server.serving(wait) as endpoint:
        assert (await ask(endpoint, timeout_s=0.2)).failure == "timeout"
        ended.set()
    assert (await ask(endpoint)).failure == "connection refused"


async def test_a_connection_is_used_again_unless_its_answer_failed() -> None:
    peers = []
    ended = asyncio.Event()

    async def handle(request: web.Request) -> web.StreamResponse:
        peers.append(request.transport and request.transport.get_extra_info("peername"))
        if len(peers) == 3:
            await ended.wait()
        return web.json_response(fake_server.whole(TOKENS))

    async with fake_server.serving(handle) as endpoint:
        found = clients(endpoint, timeout_s=1)
        failures = [(await found.ask(found.new())).failure for _ in range(4)]
        ended.set()
    assert failures == ["", "", "timeout", ""]
    assert peers[0] == peers[1] == peers[2] != peers[3]


def test_responses_are_read_in_every_framing() -> None:
    head = b"HTTP/1.1 200 OK\r\n"
    length = head + b"Content-Length: 4\r\n\r\nbody"
    chunked = head + b"Transfer-Encoding: chunked\r\n\r\n2\r\nbo\r\n2;x\r\ndy\r\n0\r\n\r\n"
    for whole in (length, chunked):
        reply = parse(whole, ended=False)
        assert reply is not None
        assert (reply.status, reply.body) == (200, b"body")
        assert all(parse(whole[:cut], ended=True) is None for cut in range(len(whole)))
    until_closed = head + b"\r\nbody"
    assert parse(until_closed, ended=False) is None
    reply = parse(until_closed, ended=True)
    assert reply is not None
    assert reply.body == b"body"


async def test_no_answer_says_why() -> None:
    with pytest.raises(NoAnswer, match="connection refused"):
        await Connections("http://127.0.0.1:9", 5).send(b"")


# -- loops -----------------------------------------------------------------------------------------


def test_arrivals_are_poisson_with_a_fixed_seed() -> None:
    first, second = (list(loops.poisson(50, 200, random.Random(1))) for _ in range(2))
    assert first == second
    assert len(first) == pytest.approx(10_000, rel=0.03)
    gaps = sorted(b - a for a, b in itertools.pairwise(first))
    assert gaps[len(gaps) // 2] == pytest.approx(0.6931 / 50, rel=0.05)  # median of an exponential


async def test_an_open_loop_sends_every_request_though_none_is_answered() -> None:
    release = asyncio.Event()
    waiting = 0

    async def handle(_: web.Request) -> web.StreamResponse:
        nonlocal waiting
        waiting += 1
        await release.wait()
        return web.json_response(fake_server.whole(TOKENS))

    async with fake_server.serving(handle) as endpoint:
        began, asked = await loops.open_loop(clients(endpoint), [0.001 * i for i in range(200)], 1)
        while waiting < 200:
            await asyncio.sleep(0.01)
        release.set()
        outcomes = await asyncio.gather(*asked)

    assert all(o.is_answered for o in outcomes)
    assert [o.due - began for o in outcomes] == pytest.approx([0.001 * i for i in range(200)])
    assert all(o.ended >= began + 1 for o in outcomes)


async def test_an_honest_retry_after_is_told_from_a_lie() -> None:
    shares = {}
    # One refuses each request once, the other twice, and both promise room at once.
    for name, refusals in (("honest", 1), ("lie", 2)):
        desk = Desk(places=100, work_s=0.01, refusals=refusals)
        async with fake_server.serving(desk.handle) as endpoint:
            opened, outcomes = await loops.closed_loop(clients(endpoint), 4, 0.1, 1.0)
        found = overload_figures.obedience(outcomes, 4, opened, 1.0)
        assert found.refused > 4
        assert not found.failures
        shares[name] = found.admitted_share
    assert shares == {"honest": 1.0, "lie": 0.0}


async def test_recovery_is_the_first_fast_answer() -> None:
    asked = 0
    ended = asyncio.Event()

    async def handle(_: web.Request) -> web.StreamResponse:
        nonlocal asked
        asked += 1
        if asked <= 2:
            return web.Response(status=503)
        if asked == 3:
            await ended.wait()
        return web.json_response(fake_server.whole(TOKENS))

    async with fake_server.serving(handle) as endpoint:
        found = await loops.recovery(clients(endpoint), fast_s=10, within_s=60)
        ended.set()
    assert found is not None
    assert found >= 3 * loops.PROBE_EVERY_S
    assert asked >= 4


async def test_slow_answers_are_no_recovery() -> None:
    """Each of the first probes is answered when the next one comes: an interval later."""
    asked = 0
    came = asyncio.Condition()

    async def handle(_: web.Request) -> web.StreamResponse:
        nonlocal asked
        async with came:
            asked += 1
            own = asked
            came.notify_all()
            if own < 5:
                await came.wait_for(lambda: asked > own)
        return web.json_response(fake_server.whole(TOKENS))

    async with fake_server.serving(handle) as endpoint:
        await loops.recovery(clients(endpoint), fast_s=0.8 * loops.PROBE_EVERY_S, within_s=60)
    assert asked >= 5


async def test_a_user_who_is_sent_away_for_long_does_not_prolong_the_loop() -> None:
    asked = 0

    async def handle(_: web.Request) -> web.StreamResponse:
        nonlocal asked
        asked += 1
        if asked == 1:
            return web.Response(status=429, headers={"Retry-After": "3600"})
        await asyncio.sleep(0.01)
        return web.json_response(fake_server.whole(TOKENS))

    async with fake_server.serving(handle) as endpoint, asyncio.timeout(60):
        _, outcomes = await loops.closed_loop(clients(endpoint), 2, 0.1, 0.5)
    assert sum(o.is_refused for o in outcomes) == 1
    assert len(outcomes) > 3


async def test_no_recovery_is_none() -> None:
    async with fake_server.serving(answering(status=503)) as endpoint:
        assert await loops.recovery(clients(endpoint), fast_s=10, within_s=0.5) is None


# -- the command -----------------------------------------------------------------------------------


def arguments(output: Path) -> Namespace:
    return Namespace(
        output=output,
        seed=0,
        timeout=20.0,
        users=[4],
        seconds=2.0,
        calibration_seconds=2.0,
        obeying=5.0,
        factors=[5.0],
        recovery=20.0,
    )


@pytest.mark.long
async def test_the_command_agrees_with_the_server_about_its_own_overload(tmp_path: Path) -> None:
    desk = Desk(places=4, work_s=0.05)
    async with fake_server.serving(desk.handle) as endpoint:
        await overload.run(endpoint, arguments(tmp_path))

    results = read_json(tmp_path / "overload.json")
    assert results["plateau"]["users"] == 4
    assert 0 < results["plateau"]["requests_per_s"] <= 80  # four places, 50 ms each
    calm, heavy = results["loads"]
    assert (calm["factor"], heavy["factor"]) == (0.8, 5.0)
    assert heavy["refused"]["count"] > heavy["accepted"]["count"]
    assert heavy["refusals"].keys() == {"429"}
    assert heavy["told_when"] == 1.0
    assert heavy["accepted"]["p50_s"] >= 0.05
    assert heavy["recovered_s"] is not None
    assert not heavy["failures"]
    assert results["obedience"]["users"] == 12
    assert desk.statuses[429] >= heavy["refused"]["count"] + results["obedience"]["refused"]
    assert desk.statuses[200] >= heavy["accepted"]["count"] + results["obedience"]["admitted"]


async def test_a_server_that_answers_nothing_is_no_measurement(tmp_path: Path) -> None:
    async with fake_server.serving(answering(data={}, status=500)) as endpoint:
        with pytest.raises(script.Missed, match=r"nothing was answered to 4 users.*status 500"):
            await overload.run(endpoint, arguments(tmp_path))
