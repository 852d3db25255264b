"""Turns what a replica does into the signals of the autoscaling policy.

Needs neither Ray nor torch: the simulator in `loadtest/simulation` runs these meters on its own
clock.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable

import blip2_serve
from blip2_serve.scaling import Signals

Clock = Callable[[], float]  # seconds
MIN_INTERVAL_S = 0.5  # shortest interval that a rate is taken over


class Deltas:
    """How much running totals grow from one reading to the next."""

    def __init__(self, clock: Clock = time.monotonic) -> None:
        self._clock = clock
        self._read_at = clock()
        self._totals: dict[str, float] = {}

    def read(self, **totals: float) -> tuple[float, dict[str, float]]:
        """Returns the seconds since the last reading and the growth of each total in that time.

        A name seen for the first time grew from zero.
        """
        now = self._clock()
        seconds, self._read_at = now - self._read_at, now
        growth = {name: total - self._totals.get(name, 0.0) for name, total in totals.items()}
        self._totals = totals
        return seconds, growth


class RecentMean:
    """The mean over roughly the last `memory` items; older ones fade."""

    def __init__(self, memory: int = 200) -> None:
        self._decay = 1 - 1 / memory
        self._sum = self._weight = 0.0

    def add(self, total: float, items: float) -> None:
        """Adds `items` items that sum to `total`."""
        decay = self._decay**items
        self._sum = decay * self._sum + total
        self._weight = decay * self._weight + items

    @property
    def value(self) -> float | None:
        """None until there are items."""
        return self._sum / self._weight if self._weight else None


class RecentRate:
    """How fast a total has grown of late. One thread may note while others read."""

    def __init__(self, readings: int = 5, clock: Clock = time.monotonic) -> None:
        self._clock = clock
        self._noted = deque([(clock(), 0.0)], maxlen=readings + 1)

    def note(self, total: float) -> None:
        """Notes a reading; call it at regular intervals."""
        self._noted.append((self._clock(), total))

    @property
    def per_s(self) -> float:
        """Over the last `readings` intervals; 0 before the first one is over."""
        (began, before), *_, (now, total) = [self._noted[0], self._noted[-1]]
        return (total - before) / (now - began) if now > began else 0.0


class StepCost:
    """Fits the seconds of a step as `fixed + per_item * items`.

    Ordinary least squares over roughly the last `memory` steps. Steps of nearly equal size cannot
    separate the two terms; then everything counts as `per_item`, which promises no gain from larger
    steps. One thread may add while others read.
    """

    # Sizes are nearly equal if their standard deviation is below this share of their mean.
    MIN_SPREAD = 0.2

    def __init__(self, memory: int = 1000) -> None:
        self._decay = 1 - 1 / memory
        # Replaced as a whole, so that a reader never sees half an update.
        self._sums = (0.0, 0.0, 0.0, 0.0, 0.0)

    def add(self, items: float, seconds: float) -> None:
        """Adds a step of `items` > 0."""
        decay, (n, x, y, xx, xy) = self._decay, self._sums
        self._sums = (
            decay * n + 1,
            decay * x + items,
            decay * y + seconds,
            decay * xx + items * items,
            decay * xy + items * seconds,
        )

    @property
    def known(self) -> bool:
        """Whether any step was added; the other methods need one."""
        return self._sums[0] > 0

    @property
    def fixed_and_per_item(self) -> tuple[float, float]:
        """Seconds, neither below 0."""
        n, x, y, xx, xy = self._sums
        mean, seconds = x / n, y / n
        variance = xx / n - mean * mean
        proportional = seconds / mean
        if variance < (self.MIN_SPREAD * mean) ** 2:
            return 0.0, proportional
        per_item = (xy / n - mean * seconds) / variance
        per_item = min(max(per_item, 0.0), proportional)
        return seconds - per_item * mean, per_item

    def seconds(self, items: float) -> float:
        """Expected seconds of a step of this size."""
        fixed, per_item = self.fixed_and_per_item
        return fixed + per_item * items


def seconds_since_import() -> float:
    """Seconds since this package was imported: close to the age of a replica's process."""
    return time.monotonic() - blip2_serve.IMPORTED_AT


class Meter:
    """What the meters of all stages share."""

    def __init__(self, clock: Clock, age: Clock) -> None:
        self._cost = StepCost()
        self._deltas = Deltas(clock)
        self._age = age
        self.start_s: float | None = None
        self.refused = 0  # items that no replica could take, as callers told this one

    def ready(self) -> None:
        """Takes the replica's age as its start-up time. Call when it can take requests."""
        self.start_s = self._age()


class BatchMeter(Meter):
    """Meters a stage that computes batches of up to `max_batch_size` items in `threads` threads."""

    def __init__(
        self,
        max_batch_size: int = 1,
        threads: int = 1,
        clock: Clock = time.monotonic,
        age: Clock = seconds_since_import,
    ) -> None:
        super().__init__(clock, age)
        self._max_batch_size = max_batch_size
        self._threads = threads
        # Totals since the start.
        self.items = self.batches = 0
        self.seconds = 0.0  # summed over batches, side by side or not

    def computed(self, items: int, seconds: float) -> None:
        """Counts one batch that one thread computed."""
        self.items += items
        self.batches += 1
        self.seconds += seconds
        self._cost.add(items, seconds)

    def signals(self, waiting: int) -> Signals:
        """Returns the signals since the last call. Call once per reporting interval.

        `waiting` is the number of items that no batch has taken yet.
        """
        seconds, growth = self._deltas.read(finished=self.items, refused=self.refused)
        return Signals(
            _rate(growth["finished"], seconds),
            waiting,
            self.capacity(),
            self.start_s,
            refused=_rate(growth["refused"], seconds),
        )

    def capacity(self) -> float | None:
        """Items per second with full batches; None until it is known."""
        if not self._cost.known:
            return None
        return self._threads * self._max_batch_size / self._cost.seconds(self._max_batch_size)


class EngineMeter(Meter):
    """Meters the generator, whose requests share steps."""

    BUSY = 0.5  # share of its capacity that a replica handles without requests piling up
    # On average, a running request has computed its prompt and half of its answer.
    RUNNING_IS_DONE = 0.75

    def __init__(
        self,
        max_num_seqs: int,
        clock: Clock = time.monotonic,
        age: Clock = seconds_since_import,
    ) -> None:
        super().__init__(clock, age)
        self._max_num_seqs = max_num_seqs
        self._work = Deltas(clock)
        self._arrived = self._left = self._answered = self._answer_tokens = 0
        self._steps = self._step_tokens = self._step_seconds = 0.0
        self._tokens_per_request = RecentMean()  # computed for it, prompt and answers
        self._tokens_per_answer = RecentMean()  # generated for a request, in all its sequences

    def arrived(self) -> None:
        """Counts a request that came in."""
        self._arrived += 1

    def left(self, answer_tokens: int) -> None:
        """Counts a request that is over, with the tokens that all its sequences generated.

        0 tokens mean that it was refused or given up before the first one.
        """
        self._left += 1
        self._answered += answer_tokens > 0
        self._answer_tokens += answer_tokens

    def stepped(self, tokens: int, seconds: float, steps: float = 1) -> None:
        """Counts an engine step of `tokens` tokens, or several such steps.

        `seconds` is the time of one step. Safe to call from the engine's thread.
        """
        self._steps += steps
        self._step_tokens += steps * tokens
        self._step_seconds += steps * seconds
        self._cost.add(tokens, seconds)

    def signals(self, running: int, waiting: int, kv_share: float) -> Signals:
        """Returns the signals since the last call. Call once per reporting interval.

        `running` counts sequences, `waiting` requests; `kv_share` is the share of the KV slots
        (0 to 1) that running requests hold.
        """
        seconds, growth = self._deltas.read(
            left=self._left,
            steps=self._steps,
            step_seconds=self._step_seconds,
            refused=self.refused,
        )
        occupancy = max(running / self._max_num_seqs, kv_share)
        steps = growth["steps"]
        capacity = self.capacity(running, waiting, kv_share)
        return Signals(
            finished=_rate(growth["left"], seconds),
            waiting=waiting + self._surplus(running, capacity),
            capacity=capacity,
            start_s=self.start_s,
            refused=_rate(growth["refused"], seconds),
            occupancy=occupancy,
            step_s=growth["step_seconds"] / steps if steps else None,
            fixed_step_s=self._cost.fixed_and_per_item[0] if self._cost.known else None,
        )

    def capacity(self, running: int, waiting: int, kv_share: float) -> float | None:
        """Requests per second with as many sequences at once as fit; None until it is known.

        Arguments as for `signals`.
        """
        begun = self._arrived - self._left - waiting
        _, growth = self._work.read(
            answered=self._answered,
            done=self._answered + self.RUNNING_IS_DONE * begun,
            answer_tokens=self._answer_tokens,
            step_tokens=self._step_tokens,
        )
        self._tokens_per_request.add(growth["step_tokens"], max(0.0, growth["done"]))
        self._tokens_per_answer.add(growth["answer_tokens"], growth["answered"])
        occupancy = max(running / self._max_num_seqs, kv_share)
        return self._capacity(running / occupancy if running else self._max_num_seqs)

    def _surplus(self, running: int, capacity: float | None) -> float:
        """How many running sequences run only because they slow each other down.

        At the `BUSY` share of the capacity, a request may take 1 / (BUSY * capacity) seconds. Its
        own tokens use a part of that; the rest pays for the fixed cost of its steps. Little's law
        then gives how many sequences run at that load. What runs beyond is a backlog.
        """
        answer_tokens = self._tokens_per_answer.value
        request_tokens = self._tokens_per_request.value
        if capacity is None or answer_tokens is None or request_tokens is None:
            return 0.0
        fixed, per_token = self._cost.fixed_and_per_item
        fixed_s = 1 / (self.BUSY * capacity) - per_token * request_tokens
        return max(0.0, running - fixed * answer_tokens / fixed_s)

    def _capacity(self, places: float) -> float | None:
        """Requests per second with `places` sequences at once; None until it is known.

        Each token costs the `per_item` seconds of a step. The `fixed` seconds are shared by the
        sequences of a step, once for each token of an answer.
        """
        answer_tokens = self._tokens_per_answer.value
        request_tokens = self._tokens_per_request.value
        if request_tokens is None or answer_tokens is None or not self._cost.known:
            return None
        fixed, per_token = self._cost.fixed_and_per_item
        return 1 / (fixed * answer_tokens / places + per_token * request_tokens)


def _rate(count: float, seconds: float) -> float:
    """Count per second. Intervals below MIN_INTERVAL_S count as that long.

    Otherwise a batch that ends between two readings in quick succession would look like a surge.
    """
    return count / max(seconds, MIN_INTERVAL_S)
