"""Judges a history: which requests were lost, and which answers were not the undisturbed ones.

python -m tests.chaos.checker history.jsonl
"""

from __future__ import annotations

import argparse
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import numpy as np

from tests.chaos import history
from tests.chaos.history import DONE, Choice, Exchange, Fault, Record

LOGPROB_TOLERANCE = 1e-3  # float32 sums differ with the requests that share a step
DEADLINE_SLACK_S = 0.1  # the server gives up a little before a deadline
INGRESS_S = 1.0  # between the death of an ingress and what its clients see of it

OK = "ok"
EXEMPT = "exempt"


@dataclass(frozen=True)
class Verdict:
    """`fault` is OK, EXEMPT or what is wrong; `why` tells more."""

    id: str
    kind: str
    fault: str
    why: str = ""

    @property
    def is_violation(self) -> bool:
        return self.fault not in (OK, EXEMPT)


@dataclass(frozen=True)
class Report:
    verdicts: list[Verdict]
    across_faults: list[float]  # seconds between a stream's events, with a fault between them
    others: list[float]

    @property
    def violations(self) -> list[Verdict]:
        return [verdict for verdict in self.verdicts if verdict.is_violation]

    def __str__(self) -> str:
        counts = Counter((verdict.kind, verdict.fault) for verdict in self.verdicts)
        lines = [f"{count:6}  {kind}: {fault}" for (kind, fault), count in sorted(counts.items())]
        lines += [f"{v.fault.upper()}  {v.id} ({v.kind}): {v.why}" for v in self.violations]
        lines.append(f"pauses of streams across a fault: {_percentiles(self.across_faults)}")
        lines.append(f"other pauses of streams: {_percentiles(self.others)}")
        lines.append(f"{len(self.violations)} violations in {len(self.verdicts)} requests")
        return "\n".join(lines)


def check(records: Sequence[Record]) -> Report:
    """Judges every request of a history."""
    faults = [record for record in records if isinstance(record, Fault)]
    found = history.exchanges(records)
    owners = {e.sent.expected: e.sent.id for e in found}
    across: list[float] = []
    others: list[float] = []
    for exchange in found:
        times = [event.at for event in exchange.events] if exchange.sent.stream else []
        for before, after in pairwise([exchange.sent.at, *times] if times else []):
            hit = any(before <= fault.at <= after for fault in faults)
            (across if hit else others).append(after - before)
    return Report([_judge(exchange, faults, owners) for exchange in found], across, others)


def _judge(
    exchange: Exchange, faults: Sequence[Fault], owners: dict[tuple[Choice, ...], str]
) -> Verdict:
    sent = exchange.sent
    for fault, why in _faults(exchange, owners):
        if fault == "lost" and _is_exempt(exchange, faults):
            return Verdict(sent.id, sent.kind, EXEMPT, why)
        return Verdict(sent.id, sent.kind, fault, why)
    return Verdict(sent.id, sent.kind, OK)


def _faults(exchange: Exchange, owners: dict[tuple[Choice, ...], str]) -> Iterator[tuple[str, str]]:
    """What is wrong, the worst first."""
    sent, error = exchange.sent, exchange.error
    if exchange.headers and exchange.headers.headers.get("x-request-id", sent.id) != sent.id:
        yield "wrong request", f"id {exchange.headers.headers['x-request-id']}"
    if len(exchange.ended) > 1:
        yield "answered twice", f"{len(exchange.ended)} ends"
    if not exchange.ended:
        yield "lost", "never ended"
        return
    end = exchange.ended[0]
    if exchange.status is None or end.how in ("no answer", "cut"):
        yield "lost", f"status {exchange.status}, {end.how}: {end.detail}"
    elif exchange.status != 200:
        if not _is_allowed(exchange):
            yield "lost", f"status {exchange.status}: {error}"
    elif error is not None:
        if not (error.get("code") == "timeout" and _is_over(exchange)):
            yield "lost", f"an error in the stream: {error}"
    else:
        yield from _wrong_200(exchange, owners)


def _wrong_200(
    exchange: Exchange, owners: dict[tuple[Choice, ...], str]
) -> Iterator[tuple[str, str]]:
    sent, data = exchange.sent, [event.data for event in exchange.events]
    if sent.stream and data.count(DONE) != 1:
        yield "wrong 200", f"{data.count(DONE)} x [DONE], and no error"
    if sent.stream and DONE in data[:-1]:
        yield "wrong 200", "events after [DONE]"
    got = history.answer(data)
    if got == sent.expected:
        return
    if other := owners.get(got):
        yield "wrong request", f"the answer to {other}"
    if len(got) != len(sent.expected):
        yield "wrong 200", f"{len(got)} choices instead of {len(sent.expected)}"
    for index, (own, right) in enumerate(zip(got, sent.expected, strict=False)):
        for fault, why in _differences(own, right, stream=sent.stream):
            yield fault, f"choice {index}: {why}"


def _differences(got: Choice, right: Choice, *, stream: bool) -> Iterator[tuple[str, str]]:
    if got.finish_reason is None:
        yield "wrong 200", f"no finish reason after {len(got.token_ids)} tokens"
    if got.token_ids != right.token_ids:
        why = f"{len(got.token_ids)} tokens {got.token_ids}, not {right.token_ids}"
        if stream and _is_within(right.token_ids, got.token_ids):
            yield "doubled", why
        elif stream and _is_within(got.token_ids, right.token_ids):
            yield "missing", why
        else:
            yield "changed tokens", why
    if got.text != right.text:
        why = f"{got.text!r}, not {right.text!r}"
        if stream and len(got.text) > len(right.text) and _is_within(right.text, got.text):
            yield "doubled", why
        elif stream and len(got.text) < len(right.text) and _is_within(got.text, right.text):
            yield "missing", why
        else:
            yield "changed text", why
    if got.finish_reason != right.finish_reason:
        yield "changed finish reason", f"{got.finish_reason}, not {right.finish_reason}"
    if len(got.logprobs) != len(right.logprobs):
        yield "changed logprobs", f"{len(got.logprobs)} instead of {len(right.logprobs)}"
    elif got.logprobs and (most := _distance(got, right)) > LOGPROB_TOLERANCE:
        yield "changed logprobs", f"by up to {most:.3g}"


def _distance(got: Choice, right: Choice) -> float:
    return float(np.abs(np.subtract(got.logprobs, right.logprobs)).max())


def _is_within(part: Sequence[object], whole: Sequence[object]) -> bool:
    """Whether `part` is `whole` with some elements left out."""
    rest = iter(whole)
    return all(element in rest for element in part)


def _is_allowed(exchange: Exchange) -> bool:
    """Whether this status is a proper answer to the request."""
    if exchange.status == 408:
        return _is_over(exchange)
    return exchange.status == 429 and exchange.sent.may_be_refused


def _is_over(exchange: Exchange) -> bool:
    sent, end = exchange.sent, exchange.ended[0]
    return sent.deadline_s is not None and end.at - sent.at >= sent.deadline_s - DEADLINE_SLACK_S


def _is_exempt(exchange: Exchange, faults: Sequence[Fault]) -> bool:
    """Whether an ingress died during the request, shortly before it was lost."""
    if not exchange.ended:
        return False
    ended = exchange.ended[0].at
    return any(
        fault.stage == "Ingress" and exchange.sent.at <= fault.at <= ended <= fault.at + INGRESS_S
        for fault in faults
    )


def _percentiles(pauses: Sequence[float]) -> str:
    if not pauses:
        return "none"
    p50, p99 = np.percentile(pauses, (50, 99))
    return f"p50 {p50:.3f} s, p99 {p99:.3f} s, max {max(pauses):.3f} s ({len(pauses)})"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("history", type=Path)
    report = check(history.read(parser.parse_args().history))
    print(report)
    sys.exit(bool(report.violations))


if __name__ == "__main__":
    main()
