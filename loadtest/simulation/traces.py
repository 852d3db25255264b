"""Load over time: steps, spikes, day curves, bursts.

The unit of load is one generator: 2.0 is the most that two generators can serve.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np

WARM_UP_S = 120.0  # at the first load, not counted


@dataclass(frozen=True)
class Trace:
    name: str
    duration_s: float
    load: Callable[[float], float]  # by seconds since the end of the warm-up
    seed: int

    @property
    def peak(self) -> float:
        return max(self.load(float(second)) for second in range(int(self.duration_s)))

    def arrivals(self, per_load: float) -> Iterator[float]:
        """Times of a Poisson process of `load * per_load` requests per second, warm-up first."""
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
    return Trace(name, end, lambda t: after if at <= t < until else before, seed)


def spikes(name: str, base: float, top: float, each: float, every: float, seed: int) -> Trace:
    """Four spikes of `each` seconds, one `every` so many."""

    def load(t: float) -> float:
        return top if t >= 60 and (t - 60) % every < each and t < 60 + 4 * every else base

    return Trace(name, 4 * every + 240, load, seed)


def day(name: str, low: float, high: float, length: float, seed: int, lunch: float = 0.0) -> Trace:
    """A day in `length` seconds, from night to night; `lunch` adds a peak at noon."""

    def load(t: float) -> float:
        hours = 24 * t / length
        wave = (1 - math.cos(2 * math.pi * hours / 24)) / 2
        bump = lunch * math.exp(-(((hours - 12) / 0.7) ** 2))
        return low + (high - low) * wave + bump

    return Trace(name, length, load, seed)


def bursts(name: str, low: float, high: float, length: float, seed: int) -> Trace:
    """Random levels, each for one to three minutes."""
    rng = random.Random(seed)
    levels: list[tuple[float, float]] = []
    t = 0.0
    while t < length:
        levels.append((t, rng.uniform(low, high)))
        t += rng.uniform(60, 180)

    def load(at: float) -> float:
        return next(level for begin, level in reversed(levels) if begin <= at)

    return Trace(name, length, load, seed)


def ramp(name: str, low: float, high: float, rise: float, seed: int) -> Trace:
    """Rises in `rise` seconds, stays for three minutes, falls as slowly, and stays low."""
    xs = [60, 60 + rise, 240 + rise, 240 + 2 * rise]

    def load(t: float) -> float:
        return float(np.interp(t, xs, [low, high, high, low]))

    return Trace(name, 2 * rise + 540, load, seed)


def steady(name: str, load: float, length: float, seed: int) -> Trace:
    return Trace(name, length, lambda _: load, seed)


def compared() -> list[Trace]:
    """The traces to compare policies on, once their settings are chosen."""
    return [
        step("step x8", 1.0, 8.0, 60, 560, 960, seed=401),
        step("step x2", 3.6, 7.2, 75, 575, 1000, seed=402),
        step("step x3 of few", 0.7, 2.1, 60, 600, 1080, seed=403),
        step("spike x5, 60 s", 1.4, 7.0, 65, 125, 550, seed=404),
        step("spike x4, 3 min", 1.7, 6.8, 70, 250, 740, seed=405),
        spikes("four spikes x3, 30 s", 2.0, 6.0, 30, 240, seed=406),
        day("day", 1.0, 9.0, 3000, seed=407),
        day("day with a lunch", 1.1, 5.0, 3000, seed=408, lunch=6.0),
        ramp("ramp x8 in 4 min", 1.1, 8.8, 240, seed=409),
        bursts("bursts", 2, 7.5, 1300, seed=410),
        bursts("bursts, again", 2, 7.5, 1300, seed=411),
        bursts("large bursts", 1, 8.5, 1000, seed=412),
        steady("steady", 3.1, 700, seed=413),
        steady("steady, less", 1.5, 700, seed=414),
    ]


def training() -> list[Trace]:
    """The traces to choose settings by: other shapes, other seeds."""
    return [
        step("step x4", 1.5, 6, 45, 300, 450, seed=101),
        step("step x6 of few", 0.6, 3.6, 45, 285, 420, seed=105),
        step("step x2 of few", 1.5, 3, 45, 285, 420, seed=106),
        step("spike x3, 100 s", 1.5, 4.5, 30, 130, 300, seed=102),
        step("spike x4, 50 s", 1, 4, 30, 80, 270, seed=107),
        spikes("four spikes x3.5, 25 s", 0.8, 2.8, 25, 110, seed=108),
        day("short day", 1, 6, 900, seed=103),
        bursts("other bursts", 1, 5, 500, seed=104),
        steady("other steady load", 2.2, 240, seed=109),
    ]
