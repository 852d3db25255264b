"""Service times of the three stages, read from a file. Seconds, unless a name says otherwise."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

FOLDER = Path(__file__).parent / "profiles"

MAX_ONGOING = 256  # requests at a replica, StageConfig.max_ongoing_requests


@dataclass(frozen=True)
class PoolProfile:
    """A stage that computes batches: `batch_s[n]` for n items, in each of `threads`."""

    batch_s: tuple[float, ...]
    threads: int
    varies: bool  # pictures differ in size
    start_s: float
    cost: float  # of a replica, in the unit of replica-hours

    @property
    def limit(self) -> int:
        return len(self.batch_s) - 1

    @property
    def capacity(self) -> float:
        """Items a second of a replica, at most."""
        return self.threads * self.limit / self.batch_s[-1]


@dataclass(frozen=True)
class EngineProfile:
    """A stage whose requests share steps: `step_s[n]` with n sequences; [0] is what none saves."""

    step_s: tuple[float, ...]
    prompt_s: float
    prompt_tokens: int
    answer_tokens: int  # of a request, in the mean
    kv_slots: int
    reach: int  # KV rows that a request reserves
    start_s: float
    cost: float

    @property
    def max_num_seqs(self) -> int:
        return len(self.step_s) - 1

    @property
    def places(self) -> int:
        """Sequences at once, by their number or by the KV."""
        return min(self.max_num_seqs, self.kv_slots // self.reach)

    @property
    def capacity(self) -> float:
        """Requests a second of a replica, at most."""
        return 1 / (self.prompt_s + self.answer_tokens * self.step_s[self.places] / self.places)


@dataclass(frozen=True)
class Profile:
    name: str
    slo_s: float  # within which a request is to be answered
    preprocessor: PoolProfile
    encoder: PoolProfile
    generator: EngineProfile

    @classmethod
    def load(cls, name: str) -> Profile:
        """A file of `profiles/`, or the path of another."""
        path = Path(name) if name.endswith(".json") else FOLDER / f"{name}.json"
        values = json.loads(path.read_text())
        stages = values["stages"]
        decoding = stages["preprocessor"]
        return cls(
            name=path.stem,
            slo_s=values["slo_s"],
            preprocessor=PoolProfile(
                batch_s=(0.0, decoding["decode_s"]),
                threads=decoding["threads"],
                varies=True,
                start_s=decoding["start_s"],
                cost=decoding["cost"],
            ),
            encoder=PoolProfile(
                batch_s=_line(stages["encoder"]["batch_s"]),
                threads=1,
                varies=False,
                start_s=stages["encoder"]["start_s"],
                cost=stages["encoder"]["cost"],
            ),
            generator=_engine(stages["generator"]),
        )


def _engine(values: dict[str, Any]) -> EngineProfile:
    steps = _line({size: ms / 1000 for size, ms in values["step_ms"].items()})
    return EngineProfile(
        step_s=(max(0.0, 2 * steps[1] - steps[2]), *steps[1:]),
        prompt_s=values["prompt_tokens"] * values["prompt_ms_per_token"] / 1000,
        prompt_tokens=values["prompt_tokens"],
        answer_tokens=values["answer_tokens"],
        kv_slots=min(values["kv_slots"], values["max_num_seqs"] * values["reach"]),
        reach=values["reach"],
        start_s=values["start_s"],
        cost=values["cost"],
    )


def _line(table: dict[str, float]) -> tuple[float, ...]:
    """Values for 0 to the largest key; straight lines between keys."""
    keys = [int(key) for key in table]
    return (0.0, *np.interp(range(1, max(keys) + 1), keys, list(table.values())).tolist())
