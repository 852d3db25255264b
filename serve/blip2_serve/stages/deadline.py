"""When the time of a call to a stage is over."""

from __future__ import annotations

import time

from blip2_serve.types import Call


def expiry(call: Call | None) -> float | None:
    """In seconds of time.perf_counter; None: never. Ask as soon as the call has arrived."""
    if call is None or call.seconds_left is None:
        return None
    return time.perf_counter() + call.seconds_left
