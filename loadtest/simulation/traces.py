"""Load over time: day curves, steps, spikes.

Loads are in generators: 2.0 is what two replicas of the generator can do at most.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Literal

import numpy as np

Kind = Literal["step", "spike", "day", "other"]

WARM_UP_S = 120.0  # at the load of the beginning; not counted


@dataclass(frozen=True)
class Trace:
    name: str
    kind: Kind
    duration_s: float
    load: Callable[[float], float]  # of the seconds since the warm-up's end
    seed: int

    @property
    def peak(self) -> float:
        return max(self.load(float(second)) for second in range(int(self.duration_s)))

    def arrivals(self, per_load: float) -> Iterator[float]:
        """Times of a Poisson process with `load * per_load` requests a second, warm-up first."""
        rng = np.random.default_rng(self.seed)
        bin_s = 0.25
        for index in range(int((WARM_UP_S + self.duration_s) / bin_s)):
            begin = index * bin_s
            rate = self.load(max(0.0, begin - WARM_UP_S)) * per_load
            times = rng.uniform(begin, begin + bin_s, rng.poisson(rate * bin_s))
            yield from np.sort(times).tolist()


def step(
    name: str, before: float, after: float, at: float, until: float, end: float, seed: int
) -> Trace:
    kind: Kind = "spike" if until - at < 200 else "step"
    return Trace(name, kind, end, lambda t: after if at <= t < until else before, seed)


def spikes(name: str, base: float, top: float, each: float, every: float, seed: int) -> Trace:
    """Four of them."""

    def load(t: float) -> float:
        return top if t >= 60 and (t - 60) % every < each and t < 60 + 4 * every else base

    return Trace(name, "spike", 4 * every + 240, load, seed)


def day(name: str, low: float, high: float, length: float, seed: int, lunch: float = 0.0) -> Trace:
    """A day in `length` seconds: a night, a rise, a fall; `lunch` comes on top at noon."""

    def load(t: float) -> float:
        hours = 24 * t / length
        wave = (1 - math.cos(2 * math.pi * hours / 24)) / 2
        bump = lunch * math.exp(-(((hours - 12) / 0.7) ** 2))
        return low + (high - low) * wave + bump

    return Trace(name, "day", length, load, seed)


def bursts(name: str, low: float, high: float, length: float, seed: int) -> Trace:
    """Levels drawn at random, each for one to three minutes."""
    rng = random.Random(seed)
    levels: list[tuple[float, float]] = []
    t = 0.0
    while t < length:
        levels.append((t, rng.uniform(low, high)))
        t += rng.uniform(60, 180)

    def load(at: float) -> float:
        return next(level for begin, level in reversed(levels) if begin <= at)

    return Trace(name, "other", length, load, seed)


def ramp(name: str, low: float, high: float, rise: float, seed: int) -> Trace:
    """Up in `rise` seconds, stays three minutes, down in as many, and five minutes more."""
    xs = [60, 60 + rise, 240 + rise, 240 + 2 * rise]

    def load(t: float) -> float:
        return float(np.interp(t, xs, [low, high, high, low]))

    return Trace(name, "other", 2 * rise + 540, load, seed)


def steady(name: str, load: float, length: float, seed: int) -> Trace:
    return Trace(name, "other", length, lambda _: load, seed)


def compared() -> list[Trace]:
    """What policies are compared on."""
    return [
        step("step x8", 1, 8, 60, 660, 1200, seed=1),
        step("step x2", 4, 8, 60, 660, 1200, seed=2),
        step("step x3 of few", 0.5, 1.5, 60, 660, 1200, seed=3),
        step("spike x5, 60 s", 2, 10, 60, 120, 600, seed=4),
        step("spike x4, 3 min", 2, 8, 60, 240, 780, seed=5),
        spikes("four spikes x3, 30 s", 2, 6, 30, 240, seed=6),
        day("day", 1, 10, 3600, seed=7),
        day("day with a lunch", 1, 6, 3600, seed=8, lunch=6),
        ramp("ramp x8 in 4 min", 1, 8, 240, seed=9),
        bursts("bursts", 2, 7, 1800, seed=10),
        steady("steady", 3, 900, seed=11),
    ]


def training() -> list[Trace]:
    """What Serve's default policy is tuned on: other shapes, other seeds."""
    return [
        step("step x4", 1.5, 6, 45, 300, 450, seed=101),
        step("spike x3, 100 s", 2.5, 7.5, 30, 130, 300, seed=102),
        day("short day", 1.5, 8, 700, seed=103),
        bursts("other bursts", 1, 6, 500, seed=104),
    ]


def thousand() -> Trace:
    """For a thousand replicas of all stages together, at its top."""
    return step("step x3 to 1,000 replicas", 130, 390, 30, 200, 200, seed=20)
