"""What a replica of a stage answers to `alive`."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

from ray import serve

from blip2_serve.config import AppConfig
from blip2_serve.model.fingerprint import fingerprint
from blip2_serve.observe.instruments import Instruments
from blip2_serve.types import Vitals

FORGET_AFTER_S = 10.0  # callers that no longer ask


class VitalSigns:
    """One replica's answers; `fingerprint` is that of its checkpoint."""

    def __init__(
        self,
        instruments: Instruments,
        fingerprint: str = "",
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._instruments = instruments
        self._fingerprint = fingerprint
        self._clock = clock
        self._asked: dict[str, float] = {}  # when, by caller

    def answer(self, caller: str) -> Vitals:
        """Call it once per second and caller: what is measured is measured between two calls."""
        now = self._clock()
        self._asked[caller] = now
        for other, asked in [*self._asked.items()]:
            if now - asked > FORGET_AFTER_S:
                del self._asked[other]
        return Vitals(
            serve.get_replica_context().replica_id.unique_id,
            len(self._asked),
            self._instruments.capacity(),
            self._instruments.start_s,
            self._fingerprint,
        )


def fingerprint_of(config: AppConfig, checkpoint: Path, dtype: object) -> str:
    """What image features and language model must have in common; both stages tell it alike."""
    quantize = (config.encoder.quantize, config.generator.quantize)
    return fingerprint(checkpoint, dtype=str(dtype), quantize=quantize)
