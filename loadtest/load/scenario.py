"""Scenario files: which traffic comes, how much of it and when. Unknown keys are errors."""

from __future__ import annotations

import csv
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Literal, Self

import yaml
from pydantic import BaseModel, ConfigDict, Field, model_validator

from loadtest.load.samples import Sample
from loadtest.load.traffic import KINDS
from loadtest.stats import percentiles

MIN_ANSWERS = 20  # to call a breaking point
FOLDER = Path(__file__).parents[1] / "scenarios"


class Strict(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Breaking(Strict):
    """The limits of the last 20 seconds beyond which the server has reached its breaking point."""

    failures: float = Field(0.05, gt=0, le=1, description="share of the requests")
    latency_p95_s: float = Field(10.0, gt=0)

    def why(self, recent: Sequence[Sample]) -> str:
        """Which limit is exceeded; empty if none is, or there are too few samples to tell."""
        if len(recent) < MIN_ANSWERS:
            return ""
        failures = sum(bool(sample.failure) for sample in recent) / len(recent)
        if failures > self.failures:
            return f"{failures:.0%} of the last requests failed"
        (p95,) = percentiles([sample.value for sample in recent], 95)
        if p95 > self.latency_p95_s:
            return f"the last requests' p95 was {p95:.1f} s"
        return ""


class Load(Strict):
    """The level over time: users in a closed loop, requests per second in an open one."""

    shape: Literal["steady", "ramp", "spike", "day"] = "steady"
    level: float = Field(gt=0, description="at the start")
    peak: float | None = Field(None, gt=0, description="of a ramp, a spike or a day")
    breaks: Breaking | None = Field(None, description="end the run at the breaking point")

    @model_validator(mode="after")
    def _has_peak(self) -> Self:
        if (self.shape == "steady") != (self.peak is None):
            raise ValueError("ramp, spike and day need a peak; steady has none")
        return self

    def at(self, share: float) -> float:
        """The level after this share (0 to 1) of the run."""
        peak = self.level if self.peak is None else self.peak
        match self.shape:
            case "steady":
                return self.level
            case "ramp":
                return self.level + (peak - self.level) * share
            case "spike":
                return peak if 0.4 <= share < 0.6 else self.level
            case "day":  # from night to night
                return self.level + (peak - self.level) * (1 - math.cos(2 * math.pi * share)) / 2


class Scenario(Strict):
    """One load test."""

    about: str
    weights: dict[str, float] = Field({}, description="of each kind of traffic (traffic.py)")
    arrivals: Literal["closed", "poisson", "replay"] = Field(
        "closed",
        description="closed: users wait for each answer before they go on. poisson and replay: "
        "requests start at their times, whether or not earlier ones are answered",
    )
    load: Load | None = None
    trace: str | None = Field(None, description="replay: CSV of seconds and kinds, beside this")
    seconds: float = Field(gt=0)
    drain_s: float = Field(30.0, ge=0, description="open loop: how long the last answers may take")
    think_s: tuple[float, float] = Field((0.5, 2.0), description="a user's pause between visits")
    generators: int = Field(1, ge=1, description="poisson: how many share the rate, 1 per worker")

    @model_validator(mode="after")
    def _is_complete(self) -> Self:
        if unknown := self.weights.keys() - KINDS.keys():
            raise ValueError(f"no such kind: {', '.join(sorted(unknown))}; there are {[*KINDS]}")
        if self.arrivals == "replay":
            if self.trace is None or self.load or self.weights or self.generators > 1:
                raise ValueError("replay takes a trace and neither load, weights nor generators")
        elif not self.load or not any(self.weights.values()) or self.trace:
            raise ValueError(f"{self.arrivals} arrivals need load and weights, and no trace")
        return self

    @property
    def kinds(self) -> set[str]:
        """The kinds of traffic that it sends."""
        if self.trace is not None:
            return {kind for _, kind in read_trace(Path(self.trace))}
        return {kind for kind, weight in self.weights.items() if weight}

    @property
    def run_s(self) -> float:
        """Seconds after which the run ends at the latest."""
        return self.seconds + (0.0 if self.arrivals == "closed" else self.drain_s)

    def users_at(self, second: float) -> int:
        """How many locust users to run: those of a closed loop, or generators of an open one."""
        if self.arrivals != "closed" or self.load is None:
            return self.generators
        return max(1, round(self.load.at(second / self.seconds)))

    def rate_at(self, second: float) -> float:
        """Requests per second of all generators together."""
        return self.load.at(second / self.seconds) if self.load else 0.0


def load(name: str) -> Scenario:
    """A scenario of scenarios/ by name, or the YAML file `name`.

    Raises:
        ValueError: it does not exist or is invalid.
    """
    path = Path(name) if name.endswith(".yaml") else FOLDER / f"{name}.yaml"
    if not path.exists():
        raise ValueError(f"no scenario {name!r}; there are {', '.join(names())}")
    found = Scenario.model_validate(yaml.safe_load(path.read_text()))
    if found.trace is not None:
        found = found.model_copy(update={"trace": str(path.parent / found.trace)})
    return found


def names() -> list[str]:
    return sorted(path.stem for path in FOLDER.glob("*.yaml"))


def read_trace(path: Path) -> list[tuple[float, str]]:
    """Seconds since the start and kinds, in order of time.

    Raises:
        ValueError: an unknown kind, or a time that is not a number.
    """
    with path.open(newline="") as file:
        rows = [(float(row["seconds"]), row["kind"]) for row in csv.DictReader(file)]
    if unknown := {kind for _, kind in rows} - KINDS.keys():
        raise ValueError(f"{path}: no such kind: {', '.join(sorted(unknown))}")
    return sorted(rows)
