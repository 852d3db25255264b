"""Tells whether a thread that computes has got stuck."""

from __future__ import annotations

from collections.abc import Callable

RECENT = 50  # pieces of work
LEAST_S = 5.0
TIMES_USUAL = 5.0
FIRST_S = 60.0  # the first piece of work may compile, or touch all of the memory


class Progress:
    """Measures the pieces of work of one thread, one at a time. Other threads may read it.

    `largest` is the size of the largest piece there can be, in any unit.
    """

    def __init__(self, clock: Callable[[], float], largest: float = 1.0) -> None:
        self._clock = clock
        self._largest = largest
        self._since: float | None = None  # when the current piece began, or work began to wait
        self._recent = [0.0] * RECENT  # seconds; never grows, so that others can read it
        self._sizes = [1.0] * RECENT
        self._count = 0

    @property
    def stalled_s(self) -> float:
        """Seconds since the current piece of work began, or has waited to begin; 0 when idle."""
        since = self._since
        return 0.0 if since is None else max(0.0, self._clock() - since)

    @property
    def usual_s(self) -> float:
        """Seconds that the largest piece of work may take, as long as the recent ones took.

        0 before the first. After steps of one token, a step of 512 tokens may take long.
        """
        return max(self._recent) * max(1.0, self._largest / max(self._sizes))

    def wait(self) -> None:
        """There is work, which the thread should begin soon. Call it before the thread can know."""
        if self._since is None:
            self._since = self._clock()

    def begin(self) -> None:
        self._since = self._clock()

    def end(self, size: float = 1.0) -> None:
        """The piece is done; if there is no further one, `idle` follows."""
        now = self._clock()
        assert self._since is not None
        self._recent[self._count % RECENT] = now - self._since
        self._sizes[self._count % RECENT] = size
        self._count += 1
        self._since = now

    def idle(self) -> None:
        self._since = None


def is_stalled(stalled_s: float, usual_s: float) -> bool:
    """Whether a thread that has made no progress for so long should be given up.

    Args:
        stalled_s: Seconds without progress.
        usual_s: What the largest piece of work may take; 0 before the first.
    """
    return stalled_s > (max(LEAST_S, TIMES_USUAL * usual_s) if usual_s else FIRST_S)
