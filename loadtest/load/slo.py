"""Service level objectives, and whether a run met them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import yaml
from pydantic import Field

from loadtest.load.samples import Measure, Sample, latencies
from loadtest.load.scenario import Strict
from loadtest.stats import percentiles


class Limits(Strict):
    """Upper limits in seconds."""

    p50: float | None = Field(None, gt=0)
    p95: float | None = Field(None, gt=0)
    p99: float | None = Field(None, gt=0)


class Slos(Strict):
    """The content of slo.yaml."""

    latency: dict[str, Limits] = Field({})
    ttft: dict[str, Limits] = Field({})
    inter_token: dict[str, Limits] = Field({})
    error_ratio: float | None = Field(None, ge=0, le=1)
    goodput: float | None = Field(None, ge=0, le=1)

    @classmethod
    def read(cls, path: Path) -> Slos:
        """Raises ValueError for an invalid file."""
        return cls.model_validate(yaml.safe_load(path.read_text()) or {})

    def limits(self, measure: Measure) -> dict[str, Limits]:
        """The limits by kind; tokens_per_s has none."""
        return {"latency": self.latency, "ttft": self.ttft, "inter_token": self.inter_token}.get(
            measure, {}
        )


@dataclass(frozen=True)
class Verdict:
    """One objective and what was measured."""

    name: str  # such as "caption latency p95"
    limit: float
    measured: float
    met: bool

    def __str__(self) -> str:
        word = "met" if self.met else "MISSED"
        return f"{word:6}  {self.name}: {self.measured:.3g} (limit {self.limit:g})"


def judge(samples: Iterable[Sample], slos: Slos) -> list[Verdict]:
    """Judges each objective whose kind the run had.

    A run without a single request gets one verdict, which says so and is missed.
    """
    samples = list(samples)
    requests = latencies(samples)
    if not requests:
        return [Verdict("requests", 1, 0, met=False)]
    verdicts = [*_percentile_verdicts(samples, slos)]
    if slos.error_ratio is not None:
        ratio = sum(bool(s.failure) for s in requests) / len(requests)
        verdicts.append(Verdict("error ratio", slos.error_ratio, ratio, ratio <= slos.error_ratio))
    if slos.goodput is not None:
        share = goodput(samples, slos)
        verdicts.append(Verdict("goodput", slos.goodput, share, share >= slos.goodput))
    return verdicts


def _percentile_verdicts(samples: list[Sample], slos: Slos) -> Iterator[Verdict]:
    measures: tuple[Measure, ...] = ("latency", "ttft", "inter_token")
    for measure in measures:
        for kind, limits in slos.limits(measure).items():
            values = [s.value for s in samples if s.measure == measure and s.kind == kind]
            for name, limit in limits.model_dump(exclude_none=True).items() if values else ():
                (measured,) = percentiles(values, int(name[1:]))
                yield Verdict(f"{kind} {measure} {name}", limit, measured, measured <= limit)


def goodput(samples: Iterable[Sample], slos: Slos) -> float:
    """The share of requests that were right and within every p95 limit of their kind."""
    good: dict[tuple[str, float], bool] = {}
    for sample in samples:
        limits = slos.limits(sample.measure).get(sample.kind)
        within = not (limits and limits.p95 is not None and sample.value > limits.p95)
        key = sample.kind, sample.time  # all samples of a request share its scheduled start
        good[key] = good.get(key, True) and within and not sample.failure
    return sum(good.values()) / len(good)
