"""For `gpu_app.py`: the figures of a load, its row, and what was asked."""

from __future__ import annotations

from typing import Any

from loadtest.bench.client import Window
from loadtest.bench.gpu_server import Usage
from loadtest.stats import percentiles

# For MANY users, the share of the bare processes' requests per second, whole and streamed; for FEW,
# the median milliseconds to the first text.
MANY, ASKED_WHOLE, ASKED_STREAMED = 256, 0.9, 0.85
FEW, ASKED_FIRST_TEXT_MS = 8, 60.0

LISTED_PROCESSES = 6

Row = dict[str, Any]

# Title, path in the row, format. "text" is the first text of a stream; of steps and batches there
# are means.
COLUMNS = (
    ("req/s", ("requests_per_s",), ".1f"),
    ("tok/s", ("tokens_per_s",), ".0f"),
    ("p50 ms", ("latency_ms", "p50"), ".0f"),
    ("p99", ("latency_ms", "p99"), ".0f"),
    ("text", ("first_text_ms", "p50"), ".0f"),
    ("p99", ("first_text_ms", "p99"), ".0f"),
    ("GPU", ("gpu_busy",), ".0%"),
    ("prefill", ("means", "step_ms", "prefill"), ".1f"),
    ("mixed", ("means", "step_ms", "mixed"), ".1f"),
    ("decode", ("means", "step_ms", "decode"), ".1f"),
    ("encode", ("means", "step_ms", "encode"), ".1f"),
    ("seqs", ("means", "batch", "generator"), ".1f"),
    ("images", ("means", "batch", "encoder"), ".1f"),
    ("client", ("client_cores",), ".2f"),
)
NAME_WIDTH, WIDTH = 17, 8


def row_of(server: str, users: int, stream: bool, window: Window, used: Usage) -> Row:
    """Times in milliseconds; `gpu_busy` is a share, or None."""
    requests_per_s, tokens_per_s = window.per_second()
    inside = window.ended_inside()
    first_texts = [answer.texts[0] - answer.started for answer in inside if answer.texts]
    requests = requests_per_s * used.seconds
    return {
        "server": server,
        "users": users,
        "stream": stream,
        "answers": len(inside),
        "requests_per_s": requests_per_s,
        "tokens_per_s": tokens_per_s,
        "latency_ms": _percentiles([answer.ended - answer.started for answer in inside]),
        "first_text_ms": _percentiles(first_texts),
        "gpu_busy": used.gpu_busy,
        "cpu_ms_per_request": {
            name: 1000 * seconds / requests for name, seconds in used.cpu_s.items() if requests
        },
    }


def _percentiles(seconds: list[float]) -> dict[str, float]:
    if not seconds:
        return {}
    p50, p99 = percentiles(seconds, 50, 99)
    return {"p50": 1000 * p50, "p99": 1000 * p99}


def head() -> str:
    return " " * NAME_WIDTH + "".join(f"{title:>{WIDTH}}" for title, _, _ in COLUMNS)


def lines(row: Row) -> str:
    """The row under `head`, and the CPU time of each kind of process below it."""
    name = f"{row['server']} {row['users']}{' stream' if row['stream'] else ''}"
    cells = "".join(f"{_cell(row, path, spec):>{WIDTH}}" for _, path, spec in COLUMNS)
    spent = row["cpu_ms_per_request"]
    listed = [
        f"{name.rpartition(':')[2]} {ms:.1f}" for name, ms in [*spent.items()][:LISTED_PROCESSES]
    ]
    cpu = f"CPU ms per request: {', '.join(listed)}; together {sum(spent.values()):.1f}"
    return f"{name:<{NAME_WIDTH}}{cells}\n  {cpu}"


def _cell(row: Row, path: tuple[str, ...], spec: str) -> str:
    value: Any = row
    for key in path:
        value = value.get(key) if isinstance(value, dict) else None
    return "" if value is None else format(value, spec)


def asked(loads: list[Row]) -> list[Row]:
    """What was asked of the application, and what it reached, of the loads there are."""
    found = {(row["server"], row["users"], row["stream"]): row for row in loads}
    bare = found.get(("bare", MANY, False))
    rows = []
    for stream, least in ((False, ASKED_WHOLE), (True, ASKED_STREAMED)):
        app = found.get(("app", MANY, stream))
        if app and bare:
            ratio = app["requests_per_s"] / bare["requests_per_s"]
            name = f"app / bare, {MANY} users{', streamed' if stream else ''}"
            rows.append({"what": name, "asked": f">= {least}", "is": ratio, "met": ratio >= least})
    few = found.get(("app", FEW, True))
    if few and few["first_text_ms"]:
        ms = few["first_text_ms"]["p50"]
        rows.append(
            {
                "what": f"first text p50 in ms, {FEW} users",
                "asked": f"< {ASKED_FIRST_TEXT_MS:g}",
                "is": ms,
                "met": ms < ASKED_FIRST_TEXT_MS,
            }
        )
    return rows
