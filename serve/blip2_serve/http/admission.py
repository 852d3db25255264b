"""One decision for each request: does the server take it on, or is it too busy? No Ray.

Whatever may queue is counted here. A request is admitted if all that was admitted before it will be
done soon enough: images by what preprocessor and encoder can do, answers by what the generator can
do and by how long answers have lately been. The decision is made when the headers are there, so
that most refused bodies are never parsed, and once more when the request is known.

Near the limit some are refused by chance. Otherwise a client whose request has just ended would
always take the place that this leaves, and one that comes back when it was told to would find none.
"""

from __future__ import annotations

import logging
import math
import random
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from types import TracebackType
from typing import Self

from blip2_serve.errors import Overloaded
from blip2_serve.ingress_config import AdmissionConfig
from blip2_serve.observe import metrics
from blip2_serve.observe.metrics import Recorder
from blip2_serve.types import SamplingParams

logger = logging.getLogger(__name__)

MEMORY = 50  # requests that means are taken over, roughly
SMOOTH_OVER = 8  # arrivals
SOME_FROM = 0.75  # share of the limit from which some requests are refused
CALM = 0.5  # share of `max_wait_s` up to which nobody really waits
TYPICAL = 1.5  # average answers
MOST_BIAS = 3.0  # of the stages' figures; they are never taken for too high
MOSTLY = 0.9  # images per request above which nearly every request needs the encoder
RATE_OVER_S = 5.0  # seconds that the rate of finished requests is taken over
RETURN_SHARE = 0.09  # of what the server can do: what refused clients may ask for when they return
LONGEST_RETRY_S = 60
WARN_EVERY_S = 1.0


@dataclass(frozen=True)
class Capacity:
    """What the stages can do for this ingress replica; None while no replica has told."""

    images_per_s: float | None = None  # decoded and encoded
    answers_per_s: float | None = None  # average ones


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
        self._recorder = recorder
        self._note_refused = refused
        self._clock = clock
        self._draw = draw
        # What the admitted requests still ask of the stages.
        self._requests = 0
        self._slow = 0  # those whose bodies take long to arrive, which ask for nothing yet
        self._bytes = 0  # of all bodies
        self._images = self._answers = 0.0
        self._smooth_wait = 0.0  # seconds, over the latest arrivals
        # What requests have lately been like.
        self._mean_images = 1.0  # to encode
        self._mean_tokens: float | None = None  # of one answer
        self._mean_work: float | None = None  # tokens of all answers to a request
        self._usual_s: float | None = None  # from arrival to the last token, while it was calm
        self._bias = 1.0  # the time that requests take, over what the stages' figures suggest
        self._finished: deque[float] = deque()  # when
        self._next_return = -math.inf  # when the next refused client should come back
        self._warned = -math.inf
        self._unsaid = 0  # refusals since the last warning

    def enter(self, body_bytes: int) -> Ticket:
        """Admits a request of which only the headers are known; `body_bytes` are those declared.

        Raises:
            Overloaded: it would have to wait too long, or too many bytes are held already.
        """
        if self._bytes and self._bytes + body_bytes > self._limits.max_held_bytes:
            raise self._refusal("bytes", 0.0)
        images = self._mean_images > MOSTLY
        self._check(images=images)
        self._smooth_wait += (self.wait_s(images=images) - self._smooth_wait) / SMOOTH_OVER
        share = (self._smooth_wait / self._limit_s - SOME_FROM) / (1 - SOME_FROM)
        if self._requests >= self._limits.min_requests and self._draw() < share:
            raise self._refusal("wait", 0.0)
        return Ticket(self, body_bytes)

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
        self._finished.append(self._clock())

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
            "slow_bodies": self._slow,
            "bytes": self._bytes,
            "images": self._images,
            "answers": self._answers,
        }

    def wait_s(self, *, images: bool = True) -> float:
        """Seconds until all admitted work is done; without `images`, all answers."""
        return self._bias * self.figures_s(images=images)

    def figures_s(self, *, images: bool = True) -> float:
        """The same, going by the stages' figures alone."""
        capacity = self._capacity()
        if capacity.images_per_s is None or capacity.answers_per_s is None:
            return 0.0 if self._requests < self._limits.initial_requests else math.inf
        seconds = self._answers / capacity.answers_per_s
        if images:
            seconds += self._images / capacity.images_per_s
        return seconds

    def _check(self, *, images: bool) -> None:
        """Refuses a request that would have to wait too long; with `images`, for the encoder too.

        Raises:
            Overloaded: it would.
        """
        wait, limit = self.wait_s(images=images), self._limit_s
        if wait > limit and self._requests >= self._limits.min_requests:
            raise self._refusal("wait", wait - limit)

    def _check_deadline(self, time_left: float, *, images: bool) -> None:
        """Refuses a request that would have to wait for longer than it has.

        Raises:
            Overloaded: it would.
        """
        wait = self.wait_s(images=images)
        if wait > time_left and self._requests >= self._limits.min_requests:
            raise self._refusal("deadline", wait - time_left)

    def _refusal(self, reason: str, excess_s: float) -> Overloaded:
        self._recorder.add(metrics.SHED, reason=reason)
        self._note_refused()
        retry_s = self._retry_after_s(excess_s)
        self._warn()
        return Overloaded("the server is busy; try again later", retry_after_s=retry_s)

    def _retry_after_s(self, excess_s: float) -> float:
        """When a client that is refused now should come back so as to be admitted then.

        Nobody can tell a client that comes back from a new one. So they are asked back one by one,
        at a rate that is a small share of what the server can do.
        """
        now = self._clock()
        back = max(self._next_return, now + max(excess_s, 1.0))
        if back > now + LONGEST_RETRY_S:
            return float(math.ceil(LONGEST_RETRY_S * (1 + self._draw()) / 2))
        self._next_return = back + 1 / (RETURN_SHARE * self._rate(now))
        return float(math.ceil(back - now))

    def _rate(self, now: float) -> float:
        """Requests per second that are finished, or could be while none is."""
        while self._finished and self._finished[0] <= now - RATE_OVER_S:
            self._finished.popleft()
        if self._finished:
            return len(self._finished) / RATE_OVER_S
        capacity = self._capacity()
        return min(capacity.images_per_s or 1.0, capacity.answers_per_s or 1.0)

    def _warn(self) -> None:
        """Logs at most one line per second, however many are refused."""
        self._unsaid += 1
        now = self._clock()
        if now - self._warned >= WARN_EVERY_S:
            logger.warning("busy: %d requests refused", self._unsaid)
            self._warned, self._unsaid = now, 0


class Ticket:
    """An admitted request; a context manager around its work."""

    def __init__(self, admission: Admission, body_bytes: int) -> None:
        self._admission = admission
        self._bytes = body_bytes  # held, or reserved
        self._received = 0
        self._images = self._answers = 0.0
        self._slow = False
        self.planned = False
        self._for_encoder = admission._mean_images > MOSTLY  # it was admitted as if it needed it
        self._entered = admission._clock()
        self._figures_s = admission.figures_s()

    def __enter__(self) -> Self:
        self._admission._requests += 1
        self._admission._bytes += self._bytes
        self._asks(self._admission._mean_images, 1.0)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._asks(0.0, 0.0)
        self._admission._bytes -= self._bytes
        if self._slow:
            self._admission._slow -= 1
        else:
            self._admission._requests -= 1

    def received(self, size: int) -> None:
        """So many more bytes of the body are there.

        Raises:
            Overloaded: they are more than was declared, and too many are held.
        """
        self._received += size
        more = self._received - self._bytes
        if more <= 0:
            return
        others = self._admission._bytes - self._bytes
        if others and others + self._received > self._admission._limits.max_held_bytes:
            raise self._admission._refusal("bytes", 0.0)
        self._holds(self._received)

    def slow(self) -> None:
        """The body takes long: until it is there, only those of its bytes that have come count.

        Raises:
            Overloaded: too many are that slow.
        """
        admission = self._admission
        if admission._slow >= admission._limits.max_slow_bodies:
            raise admission._refusal("bodies", 0.0)
        self._slow = True
        admission._slow += 1
        admission._requests -= 1
        self._asks(0.0, 0.0)
        self._holds(self._received)

    def complete(self) -> None:
        """The body is there.

        Raises:
            Overloaded: it was slow, and there is too much work by now.
        """
        if not self._slow:
            return
        admission, self._slow = self._admission, False
        admission._slow -= 1
        try:
            admission._check(images=admission._mean_images > MOSTLY)
        finally:
            admission._requests += 1
        self._asks(admission._mean_images, 1.0)

    def plan(self, images: int, answers: float, time_left: float | None) -> None:
        """Tells what the request asks for: images to encode, and average answers.

        Raises:
            Overloaded: it would have to wait too long, or for longer than it has.
        """
        admission, self.planned = self._admission, True
        admission._mean_images = _mean(admission._mean_images, images)
        self._asks(0.0, 0.0)
        admission._requests -= 1
        try:
            if images and not self._for_encoder:
                admission._check(images=True)
            if time_left is not None:
                admission._check_deadline(time_left, images=images > 0)
        finally:
            admission._requests += 1
        self._asks(images, answers)

    def answered(self, tokens: int, answers: int) -> None:
        """An answer is there: the tokens of all its choices, and their number."""
        self._admission.learn(tokens, answers)
        if self._answers <= TYPICAL:  # the time of others is mostly their own
            self._admission.took(self._admission._clock() - self._entered, self._figures_s)

    def encoded(self) -> None:
        """The features of one image are there."""
        self._asks(max(0.0, self._images - 1), self._answers)

    def _holds(self, size: int) -> None:
        self._admission._bytes += size - self._bytes
        self._bytes = size

    def _asks(self, images: float, answers: float) -> None:
        self._admission._images += images - self._images
        self._admission._answers += answers - self._answers
        self._images, self._answers = images, answers


def _mean(mean: float | None, value: float) -> float:
    return value if mean is None else mean + (value - mean) / MEMORY
