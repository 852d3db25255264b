"""What was asked, what came and what was broken: JSON lines, written as it happens.

Each line is one record. A request has `Sent`, then `Headers` if a response began, `Event` for each
event of a stream or one for a whole body, and `Ended`. Times are seconds of one monotonic clock.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import IO, Any, Literal

DONE = "[DONE]"

# done: the whole body, or [DONE]. closed: a stream's proper end without [DONE].
# cut: the connection was lost. no answer: not even a status came.
How = Literal["done", "closed", "cut", "no answer"]


@dataclass(frozen=True)
class Choice:
    """One answer. `logprobs` is empty if none were asked for."""

    text: str = ""
    token_ids: tuple[int, ...] = ()
    finish_reason: str | None = None
    logprobs: tuple[float, ...] = ()


@dataclass(frozen=True)
class Sent:
    id: str  # also sent as x-request-id
    kind: str  # such as "chat, sampled, stream"
    path: str
    body: dict[str, Any]  # without the picture
    stream: bool
    expected: tuple[Choice, ...]  # the undisturbed answer
    at: float
    deadline_s: float | None = None
    may_be_refused: bool = False  # by 429


@dataclass(frozen=True)
class Headers:
    id: str
    status: int
    headers: dict[str, str]  # names in lower case
    at: float


@dataclass(frozen=True)
class Event:
    id: str
    data: Any  # JSON, or DONE
    at: float


@dataclass(frozen=True)
class Ended:
    id: str
    how: How
    at: float
    detail: str = ""


@dataclass(frozen=True)
class Fault:
    kind: str  # such as "kill"
    stage: str
    pid: int
    at: float


Record = Sent | Headers | Event | Ended | Fault
_KINDS: dict[str, type[Any]] = {
    kind.__name__: kind for kind in (Sent, Headers, Event, Ended, Fault)
}


def now() -> float:
    return time.monotonic()


class Writer:
    """Appends records to a file; each is on disk when `add` returns, unless the machine fails."""

    def __init__(self, file: Path) -> None:
        self._file: IO[str] = file.open("w")

    def add(self, record: Record) -> None:
        self._file.write(json.dumps({"record": type(record).__name__, **asdict(record)}) + "\n")
        self._file.flush()

    def close(self) -> None:
        self._file.close()


def read(file: Path) -> list[Record]:
    return [_record(json.loads(line)) for line in file.read_text().splitlines()]


def _record(values: dict[str, Any]) -> Record:
    kind = _KINDS[values.pop("record")]
    if kind is Sent:
        values["expected"] = tuple(_choice(choice) for choice in values["expected"])
    record: Record = kind(**values)
    return record


def _choice(values: dict[str, Any]) -> Choice:
    ids, logprobs = tuple(values.pop("token_ids")), tuple(values.pop("logprobs"))
    return Choice(**values, token_ids=ids, logprobs=logprobs)


@dataclass
class Exchange:
    """All records of one request."""

    sent: Sent
    headers: Headers | None = None
    events: list[Event] = field(default_factory=list)
    ended: list[Ended] = field(default_factory=list)

    @property
    def status(self) -> int | None:
        return self.headers.status if self.headers else None

    @property
    def error(self) -> dict[str, Any] | None:
        """The error of a body or of a stream's event."""
        found = [e.data["error"] for e in self.events if e.data != DONE and "error" in e.data]
        return found[0] if found else None


def exchanges(records: Iterable[Record]) -> list[Exchange]:
    """Groups the records by request, in the order of sending."""
    found: dict[str, Exchange] = {}
    for record in records:
        match record:
            case Sent():
                found[record.id] = Exchange(record)
            case Headers():
                found[record.id].headers = record
            case Event():
                found[record.id].events.append(record)
            case Ended():
                found[record.id].ended.append(record)
    return list(found.values())


def answer(events: Sequence[Any]) -> tuple[Choice, ...]:
    """The answer in the JSON of one body, or in that of a stream's events."""
    parts: dict[int, list[Choice]] = {}
    for event in events:
        if event == DONE or "error" in event:
            continue
        for item in event.get("choices") or event.get("data") or ():
            parts.setdefault(item["index"], []).append(_part(item))
    return tuple(_joined(parts[index]) for index in sorted(parts))


def _part(item: dict[str, Any]) -> Choice:
    content = item.get("message") or item.get("delta") or {}
    text = content.get("content") or item.get("text") or item.get("caption") or ""
    logprobs = item.get("logprobs") or {}
    values = logprobs.get("token_logprobs") or [e["logprob"] for e in logprobs.get("content") or ()]
    ids = item.get("token_ids") or ()
    return Choice(text, tuple(ids), item.get("finish_reason"), tuple(values))


def _joined(parts: Sequence[Choice]) -> Choice:
    reasons = [part.finish_reason for part in parts if part.finish_reason]
    return Choice(
        "".join(part.text for part in parts),
        tuple(token for part in parts for token in part.token_ids),
        reasons[-1] if reasons else None,
        tuple(value for part in parts for value in part.logprobs),
    )
