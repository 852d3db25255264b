"""The tables of a comparison, in Markdown."""

from __future__ import annotations

from typing import Any

from loadtest.results import markdown_table

Run = dict[str, Any]  # profile, trace, policy and the fields of Outcome

OWN, DEFAULT = "own", "default/20"
COLUMNS = ("SLO missed, s", "late requests", "replica-hours", "flaps")


def totals(runs: list[Run]) -> str:
    """All traces together, for each profile and policy."""
    groups: dict[tuple[str, str], list[Run]] = {}
    for run in runs:
        groups.setdefault((run["profile"], run["policy"]), []).append(run)
    rows = []
    for names, some in groups.items():
        late = sum(run["late_share"] * run["requests"] for run in some)
        late /= sum(run["requests"] for run in some)
        missed, hours, flaps = (
            sum(run[key] for run in some) for key in ("missed_s", "cost_hours", "flaps")
        )
        rows.append([*names, f"{missed:.0f}", f"{late:.2%}", f"{hours:.1f}", f"{flaps}"])
    return markdown_table(("profile", "policy", *COLUMNS), rows)


def by_trace(runs: list[Run]) -> str:
    """DEFAULT → OWN for each profile and trace."""
    found = {(run["profile"], run["trace"], run["policy"]): run for run in runs}
    rows = []
    for profile, trace in dict.fromkeys((run["profile"], run["trace"]) for run in runs):
        default, own = found[profile, trace, DEFAULT], found[profile, trace, OWN]
        formats = {"missed_s": ".0f", "late_share": ".2%", "cost_hours": ".2f", "flaps": "d"}
        cells = [f"{default[key]:{form}} → {own[key]:{form}}" for key, form in formats.items()]
        rows.append([profile, trace, *cells])
    return markdown_table(("profile", "trace", *COLUMNS), rows)
