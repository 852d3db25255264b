from __future__ import annotations

import pytest

from blip2_serve.engine.progress import FIRST_S, LEAST_S, RECENT, Progress, is_stalled


@pytest.mark.parametrize(
    ("usual_s", "limit"),
    [
        pytest.param(0.0, FIRST_S, id="before any was measured"),
        pytest.param(0.01, LEAST_S, id="short ones"),
        pytest.param(3.0, 15.0, id="long ones"),
    ],
)
def test_work_is_stalled_when_it_takes_several_times_as_long_as_usual(
    usual_s: float, limit: float
) -> None:
    assert not is_stalled(limit, usual_s)
    assert is_stalled(limit + 0.1, usual_s)


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


def test_time_counts_from_when_work_waits_and_anew_when_it_begins_or_ends() -> None:
    clock = Clock()
    progress = Progress(clock)
    assert progress.stalled_s == 0
    progress.wait()
    clock.now += 2
    progress.wait()
    assert progress.stalled_s == 2
    progress.begin()
    assert progress.stalled_s == 0
    clock.now += 3
    assert (progress.stalled_s, progress.usual_s) == (3, 0)
    progress.end()
    assert (progress.stalled_s, progress.usual_s) == (0, 3)
    clock.now += 1
    assert progress.stalled_s == 1
    progress.idle()
    assert progress.stalled_s == 0


def test_the_longest_of_the_recent_pieces_is_usual() -> None:
    clock = Clock()
    progress = Progress(clock)
    for seconds in [7, *[2] * (RECENT - 1)]:
        progress.begin()
        clock.now += seconds
        progress.end()
    assert progress.usual_s == 7
    progress.begin()
    clock.now += 1
    progress.end()
    assert progress.usual_s == 2


def test_a_piece_larger_than_the_recent_ones_may_take_longer() -> None:
    clock = Clock()
    progress = Progress(clock, largest=512)
    for size, seconds, usual_s in [(1, 0.25, 128.0), (64, 0.5, 4.0), (512, 3.0, 3.0)]:
        progress.begin()
        clock.now += seconds
        progress.end(size)
        assert progress.usual_s == usual_s
