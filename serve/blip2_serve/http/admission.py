"""One decision for each request: does the server take it on, or is it too busy? No Ray.

Whatever may queue is counted here. A request is admitted if all that was admitted before it will be
done soon enough: images by what preprocessor and encoder can do, answers by what the generator can
do and by how long answers have lately been. The decision is made when the headers are there, so
that most refused bodies are never parsed, and once more when the request is known.

Tenants have shares. Each is judged by what it waits for itself: the work that the stages have, and
its own queue. While several send requests, the stages get no more of them than keeps them busy, and
the rest waits for its turn (see `fairness.py`).

Near the limit some are refused by chance. Otherwise a client whose request has just ended would
always take the place that this leaves, and one that comes back when it was told to would find none.
"""

from __future__ import annotations

import asyncio
import math
import random
import time
from collections.abc import Callable
from functools import partial
from types import TracebackType
from typing import Self

from blip2_serve.http.fairness import FairQueue, Tenant, Tenants, Work
from blip2_serve.http.refusals import Capacity, Refusals
from blip2_serve.ingress_config import AdmissionConfig
from blip2_serve.observe.metrics import Recorder
from blip2_serve.types import SamplingParams

MEMORY = 50  # requests that means are taken over, roughly
SMOOTH_OVER = 8  # arrivals
SOME_FROM = 0.75  # share of the limit from which some requests are refused
CALM = 0.5  # share of `max_wait_s` up to which nobody really waits
AT_ONCE = 2.0  # times what a request usually takes: work that keeps the stages' batches full
WINDOW = 0.1  # share of `max_wait_s` that the stages' work may take besides
TYPICAL = 1.5  # average answers
MOST_BIAS = 3.0  # of the stages' figures; they are never taken for too high
MOSTLY = 0.9  # images per request above which nearly every request needs the encoder


class Admission:
    """Admits requests while the work ahead of them will be done within `max_wait_s`.

    Args:
        limits: The settings.
        capacity: Tells what the stages can do.
        refused: Called for each refusal.
        clock: Returns seconds.
        draw: Returns a random number from 0 to 1.
    """

    def __init__(
        self,
        limits: AdmissionConfig,
        capacity: Callable[[], Capacity],
        recorder: Recorder,
        refused: Callable[[], None] = lambda: None,
        clock: Callable[[], float] = time.monotonic,
        draw: Callable[[], float] = random.random,
    ) -> None:
        self._limits = limits
        self._capacity = capacity
        self._clock = clock
        self._draw = draw
        self._refusals = Refusals(capacity, recorder, refused, clock, draw)
        # What the admitted requests still ask of the stages.
        self._queued = Work()
        self._staged = Work()  # of those that had their turn
        self._slow = 0  # those whose bodies take long to arrive, which ask for nothing yet
        self._bytes = 0  # of all bodies
        self._tenants = Tenants(clock)
        self._queue = FairQueue(self._has_room)
        # What requests have lately been like.
        self._mean_images = 1.0  # to encode
        self._mean_tokens: float | None = None  # of one answer
        self._mean_work: float | None = None  # tokens of all answers to a request
        self._usual_s: float | None = None  # from arrival to the last token, while it was calm
        self._bias = 1.0  # the time that requests take, over what the stages' figures suggest

    def enter(self, body_bytes: int, tenant: str = "") -> Ticket:
        """Admits a request of which only the headers are known; `body_bytes` are those declared.

        Raises:
            Overloaded: it would have to wait too long, or too many bytes are held already.
        """
        owner = self._tenants.get(tenant)
        self._check_bytes(owner, body_bytes)
        images = self._mean_images > MOSTLY
        wait = self._check(owner, self._limit_s, images=images)
        known = min(wait, 10 * self._limit_s)  # one that nobody knows would stay for ever
        owner.smooth_wait += (known - owner.smooth_wait) / SMOOTH_OVER
        share = (owner.smooth_wait / self._limit_s - SOME_FROM) / (1 - SOME_FROM)
        if share > 0 and self._requests >= self._always_admitted and self._draw() < share:
            raise self._refusals.refusal("wait", 0.0)
        return Ticket(self, owner, body_bytes)

    def answers(self, params: SamplingParams, default_max_tokens: int) -> float:
        """How many average answers a request asks for; its limit counts only below the mean."""
        if self._mean_tokens is None or not self._mean_work:
            return 1.0
        length = min(params.max_tokens or default_max_tokens, self._mean_tokens)
        return max(params.num_beams, params.n) * max(length, params.min_tokens) / self._mean_work

    def learn(self, tokens: int, answers: int) -> None:
        """Learns from an answered request: the tokens of all its answers, and their number."""
        self._mean_tokens = _mean(self._mean_tokens, tokens / answers)
        self._mean_work = _mean(self._mean_work, tokens)
        self._refusals.finished()

    def took(self, seconds: float, figures_s: float) -> None:
        """Learns how long an answered request took; `figures_s` is what the figures said at first.

        The bias must not follow from itself: it would swing, since times are known with a delay.
        """
        calm_s = CALM * self._limits.max_wait_s
        expected_s = self._bias * figures_s
        if max(expected_s, self.wait_s()) <= calm_s:
            self._usual_s = _mean(self._usual_s, seconds)
        elif calm_s < expected_s < math.inf:
            bias = _mean(self._bias, seconds / figures_s)
            self._bias = min(max(bias, 1.0), MOST_BIAS)

    @property
    def _limit_s(self) -> float:
        """How long all work may take for one more request to be admitted.

        What requests usually take is no wait: they share steps and batches.
        """
        return self._limits.max_wait_s + (self._usual_s or 0.0)

    def stats(self) -> dict[str, float]:
        """What the requests under way ask for and hold; all 0 when there are none."""
        return {
            "requests": self._requests,
            "waiting": len(self._queue),
            "slow_bodies": self._slow,
            "bytes": self._bytes,
            "images": self._queued.images + self._staged.images,
            "answers": self._queued.answers + self._staged.answers,
        }

    @property
    def _requests(self) -> int:
        return self._queued.requests + self._staged.requests

    @property
    def _always_admitted(self) -> int:
        """Requests under way below which every further one is admitted.

        With a replica lost, as many as with none left: until there is another one, nobody knows.
        """
        limits = self._limits
        mending = self._capacity().is_mending
        return max(limits.initial_requests, limits.min_requests) if mending else limits.min_requests

    def wait_s(self, tenant: Tenant | None = None, *, images: bool = True) -> float:
        """Seconds until a tenant's next request would have its turn; without `images`, it needs
        no encoder. Without a tenant, seconds until all admitted work is done.
        """
        return self._bias * self.figures_s(tenant, images=images)

    def figures_s(self, tenant: Tenant | None = None, *, images: bool = True) -> float:
        """The same, going by the stages' figures alone."""
        capacity = self._capacity()
        staged = self._seconds(self._staged, capacity, images=images)
        queued = self._seconds(self._queued, capacity, images=images)
        if tenant is None:
            return staged + queued
        # The others that wait get as much meanwhile, if they have that much.
        own = self._seconds(tenant.queued, capacity, images=images)
        return staged + min(queued, own * max(1, self._tenants.waiting))

    def _seconds(self, work: Work, capacity: Capacity, *, images: bool = True) -> float:
        """What the stages take for it."""
        if capacity.images_per_s is None or capacity.answers_per_s is None:
            return 0.0 if self._requests < self._limits.initial_requests else math.inf
        seconds = work.answers / capacity.answers_per_s
        if images:
            seconds += work.images / capacity.images_per_s
        return seconds

    def _has_room(self) -> bool:
        """Whether the stages should get one more request now: all there are, unless shared."""
        if not self._tenants.are_several or self._staged.requests < self._limits.min_requests:
            return True
        enough_s = AT_ONCE * (self._usual_s or 0.0) + WINDOW * self._limits.max_wait_s
        return self._bias * self._seconds(self._staged, self._capacity()) <= enough_s

    def _check_bytes(self, tenant: Tenant, size: int, held: int = 0) -> None:
        """Refuses a body, of which so many bytes count already, if too many would be held.

        Raises:
            Overloaded: they would be, by the tenant's requests or by all.
        """
        most = self._limits.max_held_bytes
        for others, limit in (
            (self._bytes - held, most),
            (tenant.bytes - held, self._tenants.share(most)),
        ):
            if others and others + size > limit:
                raise self._refusals.refusal("bytes", 0.0)

    def _check(self, tenant: Tenant, limit_s: float, *, images: bool) -> float:
        """Refuses a request that would have to wait too long; with `images`, for the encoder too.

        Returns how long it will have to.

        Raises:
            Overloaded: it would.
        """
        wait = self.wait_s(tenant, images=images)
        if wait > limit_s and self._requests >= self._always_admitted:
            raise self._refusals.refusal("wait", wait - limit_s)
        return wait

    def _check_deadline(self, tenant: Tenant, time_left: float, *, images: bool) -> None:
        """Refuses a request that would have to wait for longer than it has.

        Raises:
            Overloaded: it would.
        """
        wait = self.wait_s(tenant, images=images)
        if wait > time_left and self._requests >= self._limits.min_requests:
            raise self._refusals.refusal("deadline", wait - time_left)


class Ticket:
    """An admitted request; a context manager around its work."""

    def __init__(self, admission: Admission, tenant: Tenant, body_bytes: int) -> None:
        self._admission = admission
        self._tenant = tenant
        self._bytes = body_bytes  # held, or reserved
        self._received = 0
        self._works: tuple[Work, ...] = (admission._queued, tenant.queued)
        self._images = self._answers = 0.0
        self._priority = 0
        self._turn = asyncio.Lock()
        self._waited = False
        self._charged_s: float | None = None  # since it had its turn
        self._spent = Work()
        self._slow = False
        self.planned = False
        self._for_encoder = admission._mean_images > MOSTLY  # it was admitted as if it needed it
        self._entered = admission._clock()
        self._figures_s = admission.figures_s(tenant)

    def __enter__(self) -> Self:
        self._tenant.requests += 1
        self._admission._bytes += self._bytes
        self._tenant.bytes += self._bytes
        self._count(1)
        self._asks(self._admission._mean_images, 1.0)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._holds(0)
        if self._slow:
            self._is_slow(False)
        else:
            self._leave()
        self._tenant.requests -= 1
        if self._charged_s is not None and kind is None:
            self._tenant.served += self._cost_s(self._spent) - self._charged_s
        self._admission._queue.advance()

    def received(self, size: int) -> None:
        """So many more bytes of the body are there.

        Raises:
            Overloaded: they are more than was declared, and too many are held.
        """
        self._received += size
        if self._received > self._bytes:
            self._admission._check_bytes(self._tenant, self._received, self._bytes)
            self._holds(self._received)

    def slow(self) -> None:
        """The body takes long: until it is there, only those of its bytes that have come count.

        Raises:
            Overloaded: too many are that slow.
        """
        admission, most = self._admission, self._admission._limits.max_slow_bodies
        if admission._slow >= most or self._tenant.slow >= admission._tenants.share(most):
            raise admission._refusals.refusal("bodies", 0.0)
        self._leave()
        self._is_slow(True)
        self._holds(self._received)

    def complete(self) -> None:
        """The body is there.

        Raises:
            Overloaded: it was slow, and there is too much work by now.
        """
        if not self._slow:
            return
        admission = self._admission
        self._is_slow(False)
        try:
            images = admission._mean_images > MOSTLY
            admission._check(self._tenant, admission._limit_s, images=images)
        finally:
            self._count(1)
        self._asks(admission._mean_images, 1.0)

    def plan(self, images: int, answers: float, time_left: float | None, priority: int = 0) -> None:
        """Tells what the request asks for: images to encode, and average answers.

        One with a priority above 0, which lets others go first, is refused at half the usual wait,
        so that such requests alone keep no other one out.

        Raises:
            Overloaded: it would have to wait too long, or for longer than it has.
        """
        admission, self.planned = self._admission, True
        admission._mean_images = _mean(admission._mean_images, images)
        admission._tenants.saw(self._tenant, priority)
        self._priority = priority
        self._leave()
        try:
            if priority > 0:
                half_s = admission._limit_s - CALM * admission._limits.max_wait_s
                admission._check(self._tenant, half_s, images=images > 0)
            elif images and not self._for_encoder:
                admission._check(self._tenant, admission._limit_s, images=True)
            if time_left is not None:
                admission._check_deadline(self._tenant, time_left, images=images > 0)
        finally:
            self._count(1)
        self._asks(images, answers)

    async def turn(self) -> None:
        """Waits until the stages should get the request, all calls of it."""
        async with self._turn:
            if self._charged_s is None:
                cost_s = self._cost_s(Work(1, self._images, self._answers))
                queue = self._admission._queue
                go = partial(self._go, cost_s)
                self._waited = await queue.turn(self._tenant, self._priority, cost_s, go)

    def answered(self, tokens: int, answers: int) -> None:
        """An answer is there: the tokens of all its choices, and their number."""
        self._admission.learn(tokens, answers)
        self._spent.answers += tokens / (self._admission._mean_work or tokens or 1)
        # The time of longer ones is mostly their own, and that of others depends on their turns.
        if self._answers <= TYPICAL and not self._waited:
            self._admission.took(self._admission._clock() - self._entered, self._figures_s)

    def encoded(self) -> None:
        """The features of one image are there."""
        if self._images:
            self._spent.images += min(1.0, self._images)
        self._asks(max(0.0, self._images - 1), self._answers)
        self._admission._queue.advance()

    def _go(self, cost_s: float) -> None:
        self._charged_s, images, answers = cost_s, self._images, self._answers
        self._leave()
        self._works = (self._admission._staged,)
        self._count(1)
        self._asks(images, answers)

    def _leave(self) -> None:
        self._asks(0.0, 0.0)
        self._count(-1)

    def _count(self, change: int) -> None:
        for work in self._works:
            work.requests += change

    def _is_slow(self, slow: bool) -> None:
        self._slow = slow
        self._tenant.slow += 1 if slow else -1
        self._admission._slow += 1 if slow else -1

    def _holds(self, size: int) -> None:
        self._admission._bytes += size - self._bytes
        self._tenant.bytes += size - self._bytes
        self._bytes = size

    def _asks(self, images: float, answers: float) -> None:
        for work in self._works:
            work.images += images - self._images
            work.answers += answers - self._answers
        self._images, self._answers = images, answers

    def _cost_s(self, work: Work) -> float:
        """Seconds of the stages; none while nobody knows what they can do."""
        seconds = self._admission._seconds(work, self._admission._capacity())
        return seconds if seconds < math.inf else 0.0


def _mean(mean: float | None, value: float) -> float:
    return value if mean is None else mean + (value - mean) / MEMORY
