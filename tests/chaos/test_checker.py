"""The checker finds each kind of fault in a history that is otherwise clean."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tests.chaos import checker, history
from tests.chaos.history import DONE, Choice, Ended, Event, Fault, Headers, Record, Sent

RIGHT = (Choice("a red dog", (5, 6, 7), "stop", (-0.1, -0.2, -0.3)),)
OTHER = (Choice("two cats", (8, 9), "stop", (-0.4, -0.5)),)
OVERLOADED = {"error": {"message": "no room", "code": "overloaded"}}
TIMEOUT = {"error": {"message": "over", "code": "timeout"}}

Change = Callable[[list[Record]], None]


def piece(text: str, *tokens: int, logprob: float = 0.0, reason: str | None = None) -> Any:
    entries = [{"logprob": logprob} for _ in tokens]
    return {
        "choices": [
            {
                "index": 0,
                "delta": {"content": text},
                "token_ids": list(tokens),
                "finish_reason": reason,
                "logprobs": {"content": entries},
            }
        ]
    }


def stream(name: str = "a", start: float = 0.0) -> list[Record]:
    """A stream as it should be, an event per second."""
    pieces = [
        piece("a", 5, logprob=-0.1),
        piece(" red", 6, logprob=-0.2),
        piece(" dog", 7, logprob=-0.3, reason="stop"),
        DONE,
    ]
    return [
        Sent(name, "chat, stream", "/v1/chat/completions", {}, True, RIGHT, start),
        Headers(name, 200, {"x-request-id": name}, start + 0.5),
        *(Event(name, data, start + 1 + i) for i, data in enumerate(pieces)),
        Ended(name, "done", start + 4),
    ]


def body_of(choices: tuple[Choice, ...]) -> Any:
    return {
        "choices": [
            {
                "index": index,
                "text": choice.text,
                "token_ids": list(choice.token_ids),
                "finish_reason": choice.finish_reason,
                "logprobs": {"token_logprobs": list(choice.logprobs)},
            }
            for index, choice in enumerate(choices)
        ]
    }


def unary(
    name: str, data: Any, expected: tuple[Choice, ...] = RIGHT, status: int = 200, **more: Any
) -> list[Record]:
    return [
        Sent(name, "generate", "/v1/generate", {}, False, expected, 0.0, **more),
        Headers(name, status, {}, 1.0),
        Event(name, data, 1.0),
        Ended(name, "done", 1.0),
    ]


def verdicts(records: list[Record]) -> dict[str, str]:
    return {verdict.id: verdict.fault for verdict in checker.check(records).verdicts}


def test_a_clean_history_passes() -> None:
    records = [*stream("a"), *unary("b", body_of(RIGHT)), *unary("c", body_of(OTHER), OTHER)]
    report = checker.check(records)
    assert not report.violations
    assert {verdict.fault for verdict in report.verdicts} == {checker.OK}
    assert "0 violations in 3 requests" in str(report)


def test_a_history_is_read_back_as_it_was_written(tmp_path: Path) -> None:
    records: list[Record] = [*stream(), Fault("kill", "Encoder", 7, 1.0)]
    writer = history.Writer(tmp_path / "history.jsonl")
    for number, record in enumerate(records):
        writer.add(record)
        assert len(history.read(tmp_path / "history.jsonl")) == number + 1  # though it is open
    writer.close()
    assert history.read(tmp_path / "history.jsonl") == records


def without(index: int) -> Change:
    def change(records: list[Record]) -> None:
        del records[index]

    return change


def put(index: int, data: Any) -> Change:
    def change(records: list[Record]) -> None:
        records[index] = Event("a", data, records[index].at)

    return change


def again(index: int) -> Change:
    return lambda records: records.insert(index, records[index])


def ending(how: Any, keep: int) -> Change:
    """Keeps the first records, and ends thus."""

    def change(records: list[Record]) -> None:
        records[keep:] = [Ended("a", how, 3.0)]

    return change


def renamed(records: list[Record]) -> None:
    records[1] = Headers("a", 200, {"x-request-id": "b"}, 0.5)


@pytest.mark.parametrize(
    ("change", "fault"),
    [
        pytest.param(without(-1), "lost", id="never ended"),
        pytest.param(ending("cut", 3), "lost", id="cut"),
        pytest.param(ending("no answer", 1), "lost", id="no answer"),
        pytest.param(put(4, OVERLOADED), "lost", id="an error in the stream"),
        pytest.param(put(4, TIMEOUT), "lost", id="a timeout without a deadline"),
        pytest.param(ending("closed", 5), "wrong 200", id="closed without [DONE]"),
        pytest.param(again(5), "wrong 200", id="[DONE] twice"),
        pytest.param(without(4), "wrong 200", id="no finish reason"),
        pytest.param(put(4, piece(" dog", 7, logprob=-0.3)), "wrong 200", id="reason missing"),
        pytest.param(again(3), "doubled", id="an event twice"),
        pytest.param(put(3, piece(" red red", 6, logprob=-0.2)), "doubled", id="text twice"),
        pytest.param(put(3, piece(" red", 6, 6, logprob=-0.2)), "doubled", id="a token twice"),
        pytest.param(without(3), "missing", id="an event is missing"),
        pytest.param(put(3, piece("", 6, logprob=-0.2)), "missing", id="text is missing"),
        pytest.param(put(3, piece(" red", 9, logprob=-0.2)), "changed tokens", id="a token"),
        pytest.param(put(3, piece(" bed", 6, logprob=-0.2)), "changed text", id="text"),
        pytest.param(put(3, piece(" red", 6, logprob=-0.21)), "changed logprobs", id="logprob"),
        pytest.param(put(3, piece(" red", 6) | {"choices": []}), "missing", id="an empty event"),
        pytest.param(
            put(4, piece(" dog", 7, logprob=-0.3, reason="length")),
            "changed finish reason",
            id="finish reason",
        ),
        pytest.param(again(-1), "answered twice", id="two ends"),
        pytest.param(renamed, "wrong request", id="another request's id"),
    ],
)
def test_a_planted_fault_is_found(change: Change, fault: str) -> None:
    records = stream()
    change(records)
    assert verdicts([*records, *stream("b", 10.0)]) == {"a": fault, "b": checker.OK}


@pytest.mark.parametrize(
    ("choice", "fault"),
    [
        (replace(RIGHT[0], finish_reason=None), "wrong 200"),
        (replace(RIGHT[0], token_ids=(5, 6)), "changed tokens"),
        (replace(RIGHT[0], text="a red"), "changed text"),
        (replace(RIGHT[0], logprobs=()), "changed logprobs"),
        (replace(RIGHT[0], logprobs=(-0.1, -0.2, -0.3005)), checker.OK),
    ],
)
def test_a_body_that_is_not_the_undisturbed_one_is_found(choice: Choice, fault: str) -> None:
    assert verdicts(unary("a", body_of((choice,)))) == {"a": fault}


def test_too_few_choices_are_found() -> None:
    assert verdicts(unary("a", {"choices": []})) == {"a": "wrong 200"}
    assert verdicts(unary("a", body_of(RIGHT), (*RIGHT, *OTHER))) == {"a": "wrong 200"}


def test_an_answer_to_another_request_is_found() -> None:
    records = [*unary("a", body_of(OTHER)), *unary("b", body_of(OTHER), OTHER)]
    report = checker.check(records)
    assert [(v.id, v.fault, v.why) for v in report.violations] == [
        ("a", "wrong request", "the answer to b")
    ]


@pytest.mark.parametrize(
    ("status", "more", "fault"),
    [
        (500, {}, "lost"),
        (503, {"may_be_refused": True}, "lost"),
        (400, {}, "lost"),
        (429, {}, "lost"),
        (429, {"may_be_refused": True}, checker.OK),
        (408, {}, "lost"),
        (408, {"deadline_s": 2.0}, "lost"),  # after one second
        (408, {"deadline_s": 1.05}, checker.OK),
    ],
)
def test_statuses_that_are_allowed(status: int, more: dict[str, Any], fault: str) -> None:
    assert verdicts(unary("a", TIMEOUT, status=status, **more)) == {"a": fault}


def test_a_stream_may_end_with_an_error_at_its_deadline() -> None:
    records = stream()
    put(4, TIMEOUT)(records)
    assert isinstance(records[0], Sent)
    records[0] = replace(records[0], deadline_s=4.0)
    assert verdicts(records) == {"a": checker.OK}


@pytest.mark.parametrize(
    ("stage", "at", "fault"),
    [
        ("Ingress", 2.5, checker.EXEMPT),
        ("Generator", 2.5, "lost"),
        ("Ingress", -1.0, "lost"),  # before the request
        ("Ingress", 1.0, "lost"),  # long before its end
        ("Ingress", 3.5, "lost"),  # after its end
    ],
)
def test_only_the_death_of_an_ingress_excuses_its_requests(
    stage: str, at: float, fault: str
) -> None:
    records = stream()
    ending("cut", 4)(records)
    records.append(Fault("kill", stage, 1, at))
    assert verdicts(records) == {"a": fault}


def test_the_death_of_an_ingress_excuses_no_wrong_answer() -> None:
    records = stream()
    again(3)(records)
    records.append(Fault("kill", "Ingress", 1, 3.5))
    assert verdicts(records) == {"a": "doubled"}


def test_pauses_of_streams_are_told_apart_by_the_faults_in_them() -> None:
    records = [*stream("a"), *stream("b", 10.0), *unary("c", body_of(RIGHT))]
    records.append(Fault("kill", "Generator", 1, 2.5))
    records[4] = replace(records[4], at=3.9)  # from 2.0
    report = checker.check(records)
    assert report.across_faults == pytest.approx([1.9])
    assert len(report.others) == 7
    assert "max 1.900 s (1)" in str(report)
