"""What a replica measures about itself for the autoscaling policy.

It knows neither Ray nor torch. The simulator of `loadtest/simulation` has the same meters.
"""

from __future__ import annotations

import time
from collections.abc import Callable

import blip2_serve
from blip2_serve.scaling import Signals

Clock = Callable[[], float]  # seconds
LEAST_INTERVAL_S = 0.5  # between readings that say something


class Meter:
    """Growth of counters from one reading to the next."""

    def __init__(self, clock: Clock = time.monotonic) -> None:
        self._clock = clock
        self._read_at = clock()
        self._counts: dict[str, float] = {}

    def read(self, **counts: float) -> tuple[float, dict[str, float]]:
        """Seconds since the last reading, and by how much each has grown.

        `counts` are totals since the start; a new name counts from zero.
        """
        now = self._clock()
        seconds, self._read_at = now - self._read_at, now
        grown = {name: count - self._counts.get(name, 0.0) for name, count in counts.items()}
        self._counts = counts
        return seconds, grown


class Usual:
    """The mean over about the last `memory` items."""

    def __init__(self, memory: int = 200) -> None:
        self._keep = 1 - 1 / memory
        self._sum = self._weight = 0.0

    def add(self, total: float, items: float) -> None:
        """Items that come to so much together."""
        keep = self._keep**items
        self._sum = keep * self._sum + total
        self._weight = keep * self._weight + items

    @property
    def value(self) -> float | None:
        """None before there was any."""
        return self._sum / self._weight if self._weight else None


class StepCost:
    """Seconds of a step: `fixed`, and `each` for every item in it.

    Ordinary least squares over about the last `memory` steps. Steps of nearly one size do not tell
    the two apart; then all is `each`, which promises no gain from larger steps. One thread adds,
    others read.
    """

    # Standard deviation of sizes by their mean, below which they are nearly one.
    LEAST_SPREAD = 0.2

    def __init__(self, memory: int = 1000) -> None:
        self._keep = 1 - 1 / memory
        self._sums = (0.0, 0.0, 0.0, 0.0, 0.0)  # replaced as a whole: a reader never sees half

    def add(self, items: float, seconds: float) -> None:
        """A step with at least one item."""
        keep, (n, x, y, xx, xy) = self._keep, self._sums
        self._sums = (
            keep * n + 1,
            keep * x + items,
            keep * y + seconds,
            keep * xx + items * items,
            keep * xy + items * seconds,
        )

    @property
    def known(self) -> bool:
        return self._sums[0] > 0

    @property
    def fixed_and_each(self) -> tuple[float, float]:
        """Seconds, both at least 0. Only where `known`."""
        n, x, y, xx, xy = self._sums
        mean, seconds = x / n, y / n
        variance = xx / n - mean * mean
        proportional = seconds / mean
        if variance < (self.LEAST_SPREAD * mean) ** 2:
            return 0.0, proportional
        each = (xy / n - mean * seconds) / variance
        each = min(max(each, 0.0), proportional)
        return seconds - each * mean, each

    def seconds(self, items: float) -> float:
        """Of a step of this size. Only where `known`."""
        fixed, each = self.fixed_and_each
        return fixed + each * items


def seconds_since_import() -> float:
    """Of this package: nearly the age of a replica's process."""
    return time.monotonic() - blip2_serve.IMPORTED_AT


class StageMeter:
    """What the meters of all stages have."""

    def __init__(self, clock: Clock, age: Clock) -> None:
        self._cost = StepCost()
        self._meter = Meter(clock)
        self._age = age
        self._start_s: float | None = None

    def ready(self) -> None:
        """The replica can work from now on: its age is what it took to start."""
        self._start_s = self._age()


class BatchMeter(StageMeter):
    """For stages that compute items in batches of up to `batch`, `threads` of them at once."""

    def __init__(
        self,
        batch: int = 1,
        threads: int = 1,
        clock: Clock = time.monotonic,
        age: Clock = seconds_since_import,
    ) -> None:
        super().__init__(clock, age)
        self._batch = batch
        self._threads = threads
        self._finished = 0

    def computed(self, items: int, seconds: float) -> None:
        """One batch, in one thread."""
        self._finished += items
        self._cost.add(items, seconds)

    def signals(self, waiting: int) -> Signals:
        """To be read once in each interval: finished are those since the last time."""
        seconds, grown = self._meter.read(finished=self._finished)
        capacity = None
        if self._cost.known:
            capacity = self._threads * self._batch / self._cost.seconds(self._batch)
        return Signals(_rate(grown["finished"], seconds), waiting, capacity, self._start_s)


class EngineMeter(StageMeter):
    """For the generator, whose requests share steps."""

    BUSY = 0.5
    # A running request has its prompt and half of its answer behind it, in the mean.
    RUNNING_IS_DONE = 0.75

    def __init__(
        self,
        max_num_seqs: int,
        clock: Clock = time.monotonic,
        age: Clock = seconds_since_import,
    ) -> None:
        super().__init__(clock, age)
        self._max_running = max_num_seqs
        self._arrived = self._left = self._ended = self._answered = 0
        self._steps = self._tokens = self._seconds = 0.0
        self._request_tokens = Usual()  # computed for a request, prompt and answers
        self._answer_tokens = Usual()  # of them, of its answers

    def arrived(self) -> None:
        self._arrived += 1

    def left(self, answer_tokens: int) -> None:
        """A request, with the tokens of all its sequences; none, if it was refused or given up."""
        self._left += 1
        self._ended += answer_tokens > 0
        self._answered += answer_tokens

    def stepped(self, tokens: int, seconds: float, steps: float = 1) -> None:
        """A step of the engine, or several alike; called in its thread."""
        self._steps += steps
        self._tokens += steps * tokens
        self._seconds += steps * seconds
        self._cost.add(tokens, seconds)

    def signals(self, running: int, waiting: int, kv_share: float) -> Signals:
        """Of sequences that run, requests that wait, and the share of the KV that the former hold.

        To be read once in each interval.
        """
        begun = self._arrived - self._left - waiting
        seconds, grown = self._meter.read(
            left=self._left,
            ended=self._ended,
            done=self._ended + self.RUNNING_IS_DONE * begun,
            answered=self._answered,
            steps=self._steps,
            tokens=self._tokens,
            seconds=self._seconds,
        )
        self._request_tokens.add(grown["tokens"], max(0.0, grown["done"]))
        self._answer_tokens.add(grown["answered"], grown["ended"])
        occupancy = max(running / self._max_running, kv_share)
        steps = grown["steps"]
        capacity = self._capacity(running / occupancy if running else self._max_running)
        return Signals(
            finished=_rate(grown["left"], seconds),
            waiting=waiting + self._surplus(running, capacity),
            capacity=capacity,
            start_s=self._start_s,
            occupancy=occupancy,
            step_s=grown["seconds"] / steps if steps else None,
            least_step_s=self._cost.fixed_and_each[0] if self._cost.known else None,
        )

    def _surplus(self, running: int, capacity: float | None) -> float:
        """Running sequences that are there because others are in their way.

        More than the `BUSY` share of the capacity takes: so many requests a second have
        1 / (BUSY * capacity) seconds each, which their tokens and their parts of `fixed` fill.
        """
        answer_tokens, tokens = self._answer_tokens.value, self._request_tokens.value
        if capacity is None or answer_tokens is None or tokens is None:
            return 0.0
        fixed, each = self._cost.fixed_and_each
        left_s = 1 / (self.BUSY * capacity) - each * tokens
        return max(0.0, running - fixed * answer_tokens / left_s)

    def _capacity(self, places: float) -> float | None:
        """Requests a second with so many sequences at once.

        Each token takes `each`, and an answer's tokens their part of `fixed`, which a step's
        sequences share.
        """
        tokens, answer_tokens = self._request_tokens.value, self._answer_tokens.value
        if tokens is None or answer_tokens is None or not self._cost.known:
            return None
        fixed, each = self._cost.fixed_and_each
        return 1 / (fixed * answer_tokens / places + each * tokens)


def _rate(count: float, seconds: float) -> float:
    """A second. Of a batch that ends just before a second reading, no huge rate is made."""
    return count / max(seconds, LEAST_INTERVAL_S)
