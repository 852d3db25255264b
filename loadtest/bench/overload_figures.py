"""The figures of an overload: what was answered, refused and lost, and how the clients fared."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from loadtest.bench.client import Answer, Window
from loadtest.bench.loops import TOKENS, Outcome
from loadtest.results import markdown_table
from loadtest.stats import percentiles

LATE_S = 0.05  # requests sent later than this distort the figures


@dataclass(frozen=True)
class Latencies:
    """Seconds from when requests should have been sent."""

    count: int
    p50_s: float | None = None
    p99_s: float | None = None

    @classmethod
    def of(cls, outcomes: Sequence[Outcome]) -> Latencies:
        if not outcomes:
            return cls(0)
        return cls(len(outcomes), *percentiles([o.latency_s for o in outcomes], 50, 99))


@dataclass(frozen=True)
class OpenLoad:
    """One open loop. Rates are per second of its window; counts are of all its requests."""

    factor: float  # times the plateau
    offered_per_s: float
    answered_per_s: float  # within the window
    goodput: float  # answered_per_s / plateau
    accepted: Latencies
    refused: Latencies
    refusals: dict[str, int]  # by status
    told_when: float | None  # share of refusals with Retry-After; None if there are none
    failures: dict[str, int]  # by kind: neither answered rightly nor refused
    sent_late: int  # requests sent more than LATE_S after their time
    late_max_s: float
    client_cpu: float  # seconds of this process's CPU time per second
    recovered_s: float | None = None  # until a probe was answered as fast as at capacity


@dataclass(frozen=True)
class Obedience:
    """Clients who come back when a refusal says so."""

    users: int
    answered_per_s: float
    refused: int  # first tries that were refused with Retry-After, and tried again
    admitted: int  # of those, at the first retry
    without_retry_after: int  # refusals
    failures: dict[str, int]

    @property
    def admitted_share(self) -> float | None:
        return self.admitted / self.refused if self.refused else None


def answered_per_s(outcomes: Sequence[Outcome], opened: float, seconds: float) -> float:
    """Right answers per second of a closed loop, each counted by its share inside the window."""
    answers = [Answer(o.sent, o.ended, TOKENS) for o in outcomes if o.is_answered]
    return Window(opened, opened + seconds, answers).per_second()[0]


def failures(outcomes: Sequence[Outcome]) -> dict[str, int]:
    return dict(Counter(o.failure for o in outcomes if o.failure))


def open_load(
    outcomes: Sequence[Outcome],
    began: float,
    seconds: float,
    plateau: float,
    factor: float,
    client_cpu: float,
    recovered_s: float | None = None,
) -> OpenLoad:
    """The figures of an open loop of `seconds` from `began`."""
    accepted = [o for o in outcomes if o.is_answered]
    refused = [o for o in outcomes if o.is_refused]
    told = sum(o.retry_after_s is not None for o in refused)
    rate = sum(o.ended <= began + seconds for o in accepted) / seconds
    late = [o.sent - o.due for o in outcomes]
    return OpenLoad(
        factor=factor,
        offered_per_s=len(outcomes) / seconds,
        answered_per_s=rate,
        goodput=rate / plateau,
        accepted=Latencies.of(accepted),
        refused=Latencies.of(refused),
        refusals=dict(Counter(str(o.status) for o in refused)),
        told_when=told / len(refused) if refused else None,
        failures=failures(outcomes),
        sent_late=sum(lateness > LATE_S for lateness in late),
        late_max_s=max(late, default=0.0),
        client_cpu=client_cpu,
        recovered_s=recovered_s,
    )


def obedience(outcomes: Sequence[Outcome], users: int, opened: float, seconds: float) -> Obedience:
    """The figures of a closed loop; counts are of requests first sent inside the window."""
    firsts = [o for o in outcomes if o.tries == 1 and opened <= o.sent < opened + seconds]
    inside = {o.request for o in firsts}
    told = {o.request for o in firsts if o.is_refused and o.retry_after_s is not None}
    retries = [o for o in outcomes if o.tries == 2 and o.request in told]
    untold = [o for o in outcomes if o.request in inside and o.is_refused]
    return Obedience(
        users=users,
        answered_per_s=answered_per_s(outcomes, opened, seconds),
        refused=len(retries),
        admitted=sum(o.is_answered for o in retries),
        without_retry_after=sum(o.retry_after_s is None for o in untold),
        failures=failures([o for o in outcomes if o.request in inside]),
    )


# -- tables ----------------------------------------------------------------------------------------


def table(loads: Sequence[OpenLoad]) -> str:
    """Markdown with a row for each open loop."""
    head = [
        "x plateau",
        "offered/s",
        "answered/s",
        "of plateau",
        "accepted p50 / p99 s",
        "refused",
        "refusal p50 / p99 ms",
        "with Retry-After",
        "failed",
        "recovered after s",
        "client CPU",
    ]
    return markdown_table(head, [_row(load) for load in loads])


def _row(load: OpenLoad) -> list[str]:
    return [
        f"{load.factor:g}",
        f"{load.offered_per_s:.1f}",
        f"{load.answered_per_s:.2f}",
        f"{load.goodput:.0%}",
        f"{_number(load.accepted.p50_s)} / {_number(load.accepted.p99_s)}",
        counts(load.refusals),
        f"{_number(load.refused.p50_s, 1e3, '.1f')} / {_number(load.refused.p99_s, 1e3, '.1f')}",
        "-" if load.told_when is None else f"{load.told_when:.0%}",
        counts(load.failures),
        _number(load.recovered_s),
        f"{load.client_cpu:.0%}",
    ]


def counts(some: dict[str, int]) -> str:
    return ", ".join(f"{count} x {kind}" for kind, count in sorted(some.items())) or "0"


def _number(value: float | None, times: float = 1, form: str = ".2f") -> str:
    return "-" if value is None else format(value * times, form)


def lateness(loads: Sequence[OpenLoad]) -> str:
    """Says whether every request was sent at its time."""
    late = [load for load in loads if load.sent_late]
    if not late:
        return f"every request was sent within {LATE_S * 1e3:.0f} ms of its time"
    return "\n".join(
        f"THE SENDER FELL BEHIND at {load.factor:g} x plateau: {load.sent_late} requests were sent "
        f"more than {LATE_S * 1e3:.0f} ms late, the latest by {load.late_max_s:.2f} s"
        for load in late
    )


def admitted(found: Obedience) -> str:
    """One line about clients who obey Retry-After."""
    failed = f"; failed: {counts(found.failures)}" if found.failures else ""
    if found.admitted_share is None:
        return f"{found.users} obedient users: nobody was told to come back{failed}"
    return (
        f"{found.users} obedient users: {found.admitted_share:.1%} of {found.refused} refused "
        f"requests were admitted at their first retry, {found.answered_per_s:.2f} answered/s, "
        f"{found.without_retry_after} refusals without Retry-After{failed}"
    )
