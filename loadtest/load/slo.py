"""Service level objectives, and whether a run has kept them."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import yaml
from pydantic import BaseModel, ConfigDict, Field

from load.samples import Measure, Sample

PERCENTILES = ("p50", "p95", "p99")


class _Strict(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Limits(_Strict):
    """Seconds."""

    p50: float | None = Field(None, gt=0)
    p95: float | None = Field(None, gt=0)
    p99: float | None = Field(None, gt=0)


class Slos(_Strict):
    """The content of slo.yaml."""

    latency: dict[str, Limits] = {}
    ttft: dict[str, Limits] = {}
    inter_token: dict[str, Limits] = {}
    error_ratio: float | None = Field(None, ge=0, le=1)
    goodput: float | None = Field(None, ge=0, le=1)

    @classmethod
    def read(cls, path: Path) -> Slos:
        """Raises ValueError for what is no SLO."""
        return cls.model_validate(yaml.safe_load(path.read_text()) or {})

    def limits(self, measure: Measure) -> dict[str, Limits]:
        """By kind; none for tokens a second."""
        return {"latency": self.latency, "ttft": self.ttft, "inter_token": self.inter_token}.get(
            measure, {}
        )


@dataclass(frozen=True)
class Verdict:
    """One objective, and what was measured."""

    name: str  # such as "caption latency p95"
    limit: float
    measured: float
    kept: bool

    def __str__(self) -> str:
        word = "kept" if self.kept else "MISSED"
        return f"{word:6}  {self.name}: {self.measured:.3g} (limit {self.limit:g})"


def judge(samples: Iterable[Sample], slos: Slos) -> list[Verdict]:
    """A verdict for each objective whose kind was there.

    A run without a single request has kept none: then there is one verdict that says so.
    """
    samples = list(samples)
    requests = [sample for sample in samples if sample.measure == "latency"]
    if not requests:
        return [Verdict("requests", 1, 0, kept=False)]
    verdicts = []
    for measure in ("latency", "ttft", "inter_token"):
        for kind, limits in slos.limits(measure).items():
            values = [s.value for s in samples if s.measure == measure and s.kind == kind]
            if not values:
                # Streams of which none had a text are failures, and count as such.
                continue
            for name in PERCENTILES:
                limit: float | None = getattr(limits, name)
                if limit is not None:
                    measured = float(np.percentile(values, int(name[1:])))
                    label = f"{kind} {measure} {name}"
                    verdicts.append(Verdict(label, limit, measured, measured <= limit))
    if slos.error_ratio is not None:
        ratio = sum(bool(s.failure) for s in requests) / len(requests)
        verdicts.append(Verdict("error ratio", slos.error_ratio, ratio, ratio <= slos.error_ratio))
    if slos.goodput is not None:
        share = goodput(samples, slos)
        verdicts.append(Verdict("goodput", slos.goodput, share, share >= slos.goodput))
    return verdicts


def goodput(samples: Iterable[Sample], slos: Slos) -> float:
    """Share of the requests that were right and kept every p95 limit of their kind."""
    good: dict[tuple[str, float], bool] = {}
    for sample in samples:
        limits = slos.limits(sample.measure).get(sample.kind)
        kept = not (limits and limits.p95 is not None and sample.value > limits.p95)
        key = sample.kind, sample.time  # of one request, all samples have the same time
        good[key] = good.get(key, True) and kept and not sample.failure
    return sum(good.values()) / len(good)
