"""Admission: who is let in, who is refused, and when the refused are asked back."""

from __future__ import annotations

import logging
import random
from collections.abc import Callable
from contextlib import ExitStack, suppress
from dataclasses import replace

import pytest

from blip2_serve.errors import Overloaded
from blip2_serve.http.admission import Admission, Ticket
from blip2_serve.http.refusals import Capacity
from blip2_serve.ingress_config import AdmissionConfig
from blip2_serve.types import SamplingParams
from support.recorder import FakeRecorder

PARAMS = SamplingParams(max_tokens=2048)


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


class Server:
    """An `Admission` of a server of known capacity, and the requests it has let in."""

    def __init__(
        self, capacity: Capacity, draw: Callable[[], float] | None = None, **limits: float
    ) -> None:
        self.capacity = capacity
        self.clock = Clock()
        self.recorder = FakeRecorder()
        settings = AdmissionConfig.model_validate({"min_requests": 1, **limits})
        # By default, chance lets everyone in, and the limits are sharp.
        self.admission = Admission(
            settings,
            lambda: self.capacity,
            self.recorder,
            clock=self.clock,
            draw=draw or (lambda: 1.0),
        )
        self.inside = ExitStack()

    def arrive(
        self, *, images: int = 1, answers: float = 1.0, time_left: float | None = None
    ) -> Ticket:
        ticket = self.inside.enter_context(self.admission.enter(1000))
        ticket.plan(images, answers, time_left)
        return ticket

    def admits(self) -> int:
        """How many requests it takes on before it refuses one."""
        for count in range(10_000):
            try:
                self.arrive()
            except Overloaded:
                return count
        raise AssertionError("nothing was refused")


@pytest.mark.parametrize(
    ("capacity", "expected"),
    [
        pytest.param(Capacity(1e9, 10.0), 20, id="the generator is the bottleneck"),
        pytest.param(Capacity(10.0, 1e9), 20, id="the encoder is the bottleneck"),
        pytest.param(Capacity(20.0, 20.0), 20, id="both take their time"),
    ],
)
def test_requests_are_admitted_while_the_work_ahead_takes_max_wait_at_most(
    capacity: Capacity, expected: int
) -> None:
    server = Server(capacity, max_wait_s=2.0)

    assert abs(server.admits() - expected) <= 1


def test_the_time_that_requests_usually_take_is_no_wait() -> None:
    server = Server(Capacity(1e9, 10.0), max_wait_s=2.0)
    for _ in range(50):
        with server.admission.enter(1000) as ticket:
            server.clock.now += 1.5
            ticket.answered(10, 1)

    assert abs(server.admits() - 35) <= 1


def test_what_requests_take_while_others_wait_is_not_usual() -> None:
    server = Server(Capacity(1e9, 10.0), max_wait_s=2.0)
    with server.admission.enter(1000) as ticket:
        for _ in range(15):
            server.arrive()
        server.clock.now += 60
        ticket.answered(10, 1)

    assert abs(server.admits() - 5) <= 1


@pytest.mark.parametrize(("factor", "expected"), [(0.4, 80), (0.5, 100), (1.0, 200), (2.0, 200)])
def test_figures_too_high_are_corrected_by_what_requests_really_take(
    factor: float, expected: int
) -> None:
    """The stages claim 100 answers per second, and deliver that times `factor`."""
    server = Server(Capacity(1e9, 100.0), max_wait_s=2.0)
    queue: list[Ticket] = []
    lengths: list[int] = []
    for _ in range(6000):
        with suppress(Overloaded):
            while True:
                queue.append(server.arrive())
        server.clock.now += 1 / (100.0 * factor)
        ticket = queue.pop(0)
        ticket.answered(10, 1)
        ticket.__exit__(None, None, None)
        lengths.append(len(queue))

    # It does not swing, although times are known with a delay of a whole queue.
    assert all(length == pytest.approx(expected, rel=0.2, abs=1) for length in lengths[-3000:])


def test_a_request_that_ends_makes_room_for_one_more() -> None:
    server = Server(Capacity(1e9, 10.0))
    with server.admission.enter(1000):
        server.admits()
    server.arrive()

    with pytest.raises(Overloaded):
        server.arrive()


def test_few_requests_are_always_admitted_however_slow_the_server_is() -> None:
    assert Server(Capacity(0.01, 0.01), min_requests=8).admits() == 8


def test_while_a_lost_replica_is_replaced_as_many_are_admitted_as_with_none() -> None:
    slow = Capacity(1.0, 1.0)
    assert Server(slow, initial_requests=32).admits() < 8
    assert Server(replace(slow, is_mending=True), initial_requests=32).admits() == 32
    assert Server(replace(slow, is_mending=True), initial_requests=1, min_requests=8).admits() == 8


def test_a_wait_that_nobody_knew_is_forgotten() -> None:
    server = Server(Capacity(None, None), initial_requests=1, min_requests=4)
    with ExitStack() as unknown:
        for _ in range(4):
            unknown.enter_context(server.admission.enter(1000))
    server.capacity = Capacity(1e9, 1e9)
    for _ in range(100):
        with server.admission.enter(1000):
            pass
    assert server.admission._tenants.get("").smooth_wait < 1


def test_a_stage_that_is_not_there_yet_gets_a_bounded_number_of_requests() -> None:
    assert Server(Capacity(None, None), initial_requests=32).admits() == 32


def test_images_whose_features_are_held_cost_the_encoder_nothing() -> None:
    server = Server(Capacity(1.0, 1000.0), max_wait_s=2.0)
    for _ in range(200):  # so that it does not expect every request to need the encoder
        with server.admission.enter(0) as ticket:
            ticket.plan(0, 1.0, None)
    for _ in range(2):
        server.arrive(images=1)
    with pytest.raises(Overloaded):
        server.arrive(images=1)

    for _ in range(100):
        server.arrive(images=0)


def test_an_encoded_image_no_longer_counts() -> None:
    server = Server(Capacity(1.0, 1e9), max_wait_s=2.0)
    tickets = [server.arrive() for _ in range(2)]
    with pytest.raises(Overloaded):
        server.arrive()
    for ticket in tickets:
        ticket.encoded()

    server.arrive()


def test_long_limits_count_as_long_as_answers_really_are() -> None:
    server = Server(Capacity(100.0, 100.0))
    for _ in range(100):
        server.admission.learn(10, 1)

    assert server.admission.answers(PARAMS, 64) == pytest.approx(1)
    assert server.admission.answers(SamplingParams(max_tokens=5), 64) == pytest.approx(0.5)
    assert server.admission.answers(SamplingParams(n=4, temperature=1.0), 64) == pytest.approx(4)
    assert server.admission.answers(SamplingParams(num_beams=5), 64) == pytest.approx(5)
    assert server.admission.answers(SamplingParams(min_tokens=20), 64) == pytest.approx(2)


def test_a_request_that_cannot_be_answered_by_its_deadline_is_refused() -> None:
    server = Server(Capacity(1e9, 10.0), max_wait_s=2.0)
    for _ in range(11):
        server.arrive()

    server.arrive(time_left=1.5)
    with pytest.raises(Overloaded):
        server.arrive(time_left=1.0)
    assert server.recorder.total("blip2_shed_total", "deadline") == 1


def test_the_bytes_of_bodies_are_bounded_but_one_large_body_is_always_taken() -> None:
    server = Server(Capacity(100.0, 100.0), max_held_bytes=10_000)

    with server.admission.enter(20_000), pytest.raises(Overloaded):
        server.admission.enter(1)
    with server.admission.enter(6_000), pytest.raises(Overloaded):
        server.admission.enter(6_000)


def test_bytes_that_were_not_declared_count_as_they_come() -> None:
    server = Server(Capacity(100.0, 100.0), max_held_bytes=10_000)

    with server.admission.enter(0) as chunked, server.admission.enter(3_000) as declared:
        chunked.received(7_000)
        declared.received(2_000)
        declared.received(1_000)
        with pytest.raises(Overloaded):
            chunked.received(1)
    assert server.recorder.total("blip2_shed_total", "bytes") == 1
    assert not any(server.admission.stats().values())


def test_slow_bodies_ask_for_nothing_until_they_are_there() -> None:
    server = Server(Capacity(1e9, 1e9))
    slow = [server.inside.enter_context(server.admission.enter(200)) for _ in range(40)]
    server.capacity = Capacity(1e9, 10.0)
    with pytest.raises(Overloaded):
        server.arrive()
    for ticket in slow:
        ticket.received(100)
        ticket.slow()
    assert server.admission.stats() == {
        "requests": 0,
        "waiting": 0,
        "slow_bodies": 40,
        "bytes": 40 * 100,
        "images": pytest.approx(0),
        "answers": pytest.approx(0),
    }
    assert server.admits() >= 20
    with pytest.raises(Overloaded):
        slow[0].complete()
    server.inside.close()
    assert not any(map(round, server.admission.stats().values()))


def test_a_slow_body_that_is_there_in_good_time_counts_again() -> None:
    server = Server(Capacity(100.0, 100.0))
    with server.admission.enter(100) as ticket:
        ticket.slow()
        ticket.complete()
        assert server.admission.stats()["requests"] == 1
        assert server.admission.stats()["answers"] == pytest.approx(1)


def test_the_number_of_slow_bodies_is_bounded() -> None:
    server = Server(Capacity(100.0, 100.0), max_slow_bodies=1)
    with server.admission.enter(0) as first, server.admission.enter(0) as second:
        first.slow()
        with pytest.raises(Overloaded):
            second.slow()
    assert server.recorder.total("blip2_shed_total", "bodies") == 1
    assert not any(map(round, server.admission.stats().values()))


def test_refusals_are_logged_once_per_second(caplog: pytest.LogCaptureFixture) -> None:
    server = Server(Capacity(1e9, 10.0))
    server.admits()
    with caplog.at_level(logging.WARNING):
        for _ in range(300):
            server.clock.now += 0.01
            with pytest.raises(Overloaded):
                server.arrive()

    assert 3 <= len(caplog.records) <= 4


def test_a_client_is_asked_back_within_a_minute() -> None:
    server = Server(Capacity(1e9, 10.0))
    server.admits()
    for _ in range(5_000):
        with pytest.raises(Overloaded) as refused:
            server.arrive()
        assert 1 <= (refused.value.retry_after_s or 0) <= 60


@pytest.mark.parametrize("rate", [10.0, 200.0])
def test_clients_that_come_back_when_they_are_told_to_are_admitted(rate: float) -> None:
    """A closed population of three times what the server holds, on a simulated clock."""
    draw = random.Random(5)
    server = Server(Capacity(1e9, rate), draw.random)
    population = 3 * server.admits()
    server.inside.close()
    step, service_s = 0.01, 2.0
    due = [(draw.random(), False) for _ in range(population)]  # when a client asks, and if again
    working: list[tuple[float, Ticket]] = []
    admitted = returned = done = 0
    for tick in range(int(200 / step)):
        now = server.clock.now = tick * step
        # The server works off `rate` requests per second, in order, each for at least a moment.
        while working and working[0][0] <= now and done < rate * now:
            _, ticket = working.pop(0)
            ticket.__exit__(None, None, None)
            server.admission.learn(10, 1)
            due.append((now, False))
            done += 1
        ready, due = [d for d in due if d[0] <= now], [d for d in due if d[0] > now]
        for _, again in ready:
            counted = again and now > 60  # the first minute is the burst at the start
            returned += counted
            try:
                ticket = server.admission.enter(0).__enter__()
                ticket.plan(1, 1.0, None)
                working.append((now + service_s / 4, ticket))
                admitted += counted
            except Overloaded as error:
                due.append((now + (error.retry_after_s or 0), True))

    assert returned > 20
    assert admitted / returned >= 0.9
    assert done >= 0.85 * rate * 200


def test_a_body_that_is_longer_than_declared_does_not_count_twice() -> None:
    server = Server(Capacity(1e9, 1e9), max_held_bytes=1000)
    with server.admission.enter(50), server.admission.enter(500) as longer:
        longer.received(900)
        with pytest.raises(Overloaded):
            longer.received(100)
