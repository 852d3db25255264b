"""How many users there are at each time, for locust."""

from __future__ import annotations

import logging

from locust import LoadTestShape

from load.recording import Recording
from load.scenario import Scenario

logger = logging.getLogger(__name__)

AT_ONCE = 1_000.0  # users a second: whoever is to be there comes now
LOOK_BACK_S = 20.0


class ScenarioShape(LoadTestShape):
    """Follows the scenario's load; a ramp ends where the server does."""

    # Not to be found in a locustfile: locustfile.py makes the one that there is.
    abstract = True

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
        recent = self._recording.recent(LOOK_BACK_S)
        if load and load.breaks and (why := load.breaks.why(recent)):
            level = load.at(min(1.0, second / self._scenario.seconds))
            what = "users" if self._scenario.arrivals == "closed" else "requests a second"
            logger.warning("the breaking point: %.1f %s, %s", level, what, why)
            return None
        return self._scenario.users_at(second), AT_ONCE
