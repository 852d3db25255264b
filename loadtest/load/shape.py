"""Tells locust how many users to run at each moment."""

from __future__ import annotations

import logging

from locust import LoadTestShape

from loadtest.load.recording import Recording
from loadtest.load.scenario import Scenario

logger = logging.getLogger(__name__)

SPAWN_RATE = 1_000.0  # users per second: all at once
LOOK_BACK_S = 20.0


class ScenarioShape(LoadTestShape):
    """Follows the scenario's load, and ends a run whose server has reached its breaking point."""

    abstract = True  # locust must not pick it up: locustfile.py makes the only instance

    def __init__(self, scenario: Scenario, recording: Recording) -> None:
        super().__init__()
        self._scenario = scenario
        self._recording = recording

    def tick(self) -> tuple[int, float] | None:
        second = self.get_run_time()
        load = self._scenario.load
        done = second >= self._scenario.seconds and self.get_current_user_count() == 0
        if done or second >= self._scenario.run_s:
            return None
        if load and load.breaks and (why := load.breaks.why(self._recording.recent(LOOK_BACK_S))):
            level = load.at(min(1.0, second / self._scenario.seconds))
            unit = "users" if self._scenario.arrivals == "closed" else "requests per second"
            logger.warning("breaking point at %.1f %s: %s", level, unit, why)
            return None
        return self._scenario.users_at(second), SPAWN_RATE
