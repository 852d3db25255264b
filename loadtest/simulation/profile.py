"""The service times of the three stages, read from a file. In seconds unless a name differs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from loadtest.results import read_json

FOLDER = Path(__file__).parent / "profiles"

MAX_ONGOING = 256  # requests per replica, StageConfig.max_ongoing_requests

Configs = Mapping[str, Mapping[str, Any]]  # Serve's autoscaling_config of each stage


@dataclass(frozen=True)
class PoolProfile:
    """A stage that computes batches: `batch_s[n]` for n items, in each of `threads`."""

    batch_s: tuple[float, ...]
    threads: int
    varies: bool  # by the size of pictures
    start_s: float
    cost: float  # per replica-hour

    @property
    def limit(self) -> int:
        return len(self.batch_s) - 1

    @property
    def capacity(self) -> float:
        """Items per second that a replica can do."""
        return self.threads * self.limit / self.batch_s[-1]


@dataclass(frozen=True)
class EngineProfile:
    """A stage whose requests share steps: `step_s[n]` for n sequences, [0] for the fixed part."""

    step_s: tuple[float, ...]
    prompt_s: float
    prompt_tokens: int
    answer_tokens: int  # mean
    kv_slots: int
    reach: int  # KV slots that a request reserves
    start_s: float
    cost: float  # per replica-hour

    @property
    def max_num_seqs(self) -> int:
        return len(self.step_s) - 1

    @property
    def places(self) -> int:
        """How many sequences can run at once."""
        return min(self.max_num_seqs, self.kv_slots // self.reach)

    @property
    def capacity(self) -> float:
        """Requests per second that a replica can do."""
        return 1 / (self.prompt_s + self.answer_tokens * self.step_s[self.places] / self.places)


StageProfile = PoolProfile | EngineProfile


@dataclass(frozen=True)
class Profile:
    name: str
    slo_s: float  # a request is late beyond this
    stages: Mapping[str, StageProfile]  # in the order that requests pass them
    default_policies: Mapping[str, Configs]  # Serve's, by price of lateness

    @property
    def generator(self) -> EngineProfile:
        generator = self.stages["generator"]
        assert isinstance(generator, EngineProfile)
        return generator

    @classmethod
    def load(cls, name: str) -> Profile:
        """A file of `profiles/` by name, or the path of another."""
        path = Path(name) if name.endswith(".json") else FOLDER / f"{name}.json"
        values = read_json(path)
        stages: dict[str, StageProfile] = {
            name: _engine(stage)
            if name == "generator"
            else PoolProfile(**{**stage, "batch_s": _line(stage["batch_s"])})
            for name, stage in values["stages"].items()
        }
        return cls(path.stem, values["slo_s"], stages, values["default_policies"])


def _engine(values: dict[str, Any]) -> EngineProfile:
    steps = _line({size: ms / 1000 for size, ms in values["step_ms"].items()})
    return EngineProfile(
        step_s=(max(0.0, 2 * steps[1] - steps[2]), *steps[1:]),
        prompt_s=values["prompt_tokens"] * values["prompt_ms_per_token"] / 1000,
        kv_slots=min(values["kv_slots"], values["max_num_seqs"] * values["reach"]),
        **{k: values[k] for k in ("prompt_tokens", "answer_tokens", "reach", "start_s", "cost")},
    )


def _line(table: dict[str, float]) -> tuple[float, ...]:
    """Values for 0 to the largest key, linear between keys."""
    keys = [int(key) for key in table]
    return (0.0, *np.interp(range(1, max(keys) + 1), keys, list(table.values())).tolist())
