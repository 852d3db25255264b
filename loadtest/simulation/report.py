"""The table and the plot of a comparison."""

from __future__ import annotations

from pathlib import Path
from typing import Any

Results = dict[str, list[dict[str, Any]]]  # of each profile, runs as `simulate.run` makes them

OWN, DEFAULT = "own", "default/20"
BEGIN, END = "<!-- table of the simulation -->", "<!-- end of the table -->"
COLORS = {DEFAULT: "#b35806", OWN: "#1b7837"}


def table(results: Results) -> str:
    """Markdown: default -> own, for each profile and trace."""
    lines = [
        "| profile | trace | SLO missed, s | requests too late | replica-hours | flaps |",
        "|---|---|---|---|---|---|",
    ]
    for profile, runs in results.items():
        for trace in dict.fromkeys(run["trace"] for run in runs):
            d, o = (_run(runs, trace, policy) for policy in COLORS)
            lines.append(
                f"| {profile} | {trace} "
                f"| {d['missed_s']:.0f} → {o['missed_s']:.0f} "
                f"| {d['late_share']:.2%} → {o['late_share']:.2%} "
                f"| {d['cost_hours']:.2f} → {o['cost_hours']:.2f} "
                f"| {d['flaps']} → {o['flaps']} |"
            )
    return "\n".join(lines)


def totals(results: Results) -> str:
    """Markdown: all traces together, for each policy."""
    lines = [
        "| comparison | policy | SLO missed, s | requests too late | replica-hours | flaps |",
        "|---|---|---:|---:|---:|---:|",
    ]
    for name, runs in results.items():
        for policy in dict.fromkeys(run["policy"] for run in runs):
            own = [run for run in runs if run["policy"] == policy]
            requests = sum(run["requests"] for run in own)
            late = sum(run["late_share"] * run["requests"] for run in own) / requests
            lines.append(
                f"| {name} | {policy} | {sum(run['missed_s'] for run in own):.0f} | {late:.2%} "
                f"| {sum(run['cost_hours'] for run in own):.1f} "
                f"| {sum(run['flaps'] for run in own)} |"
            )
    return "\n".join(lines)


def write_section(readme: Path, text: str) -> None:
    """Between the two marks."""
    before, _, rest = readme.read_text().partition(BEGIN)
    _, _, after = rest.partition(END)
    readme.write_text(f"{before}{BEGIN}\n{text}\n{END}{after}")


def plot(results: Results, path: Path) -> None:
    """Two courses of the first profile; seconds without SLO and replica-hours of all traces."""
    import matplotlib as mpl

    mpl.use("agg")
    from matplotlib import pyplot

    runs = next(iter(results.values()))
    figure, axes = pyplot.subplots(2, 2, figsize=(12, 10), layout="constrained")
    for axis, trace in zip(axes[0], ("step x8", "day with a lunch"), strict=True):
        _course(axis, runs, trace)
    _bars(axes[1][0], results, "missed_s", "seconds in which more than 5% were too late")
    _bars(axes[1][1], results, "cost_hours", "replica-hours, by cost")
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def _course(axis: Any, runs: list[dict[str, Any]], trace: str) -> None:
    for policy in COLORS:
        run = _run(runs, trace, policy)
        minutes = [second / 60 for second in run["series"]["seconds"]]
        axis.plot(
            minutes, run["series"]["replicas"]["generator"], color=COLORS[policy], label=policy
        )
    axis.plot(minutes, run["load"], color="black", linewidth=0.8, label="load")
    axis.set_xlim(0, minutes[-1])
    axis.set_title(f"{trace}: generators")
    axis.set_xlabel("minutes")
    axis.legend()


def _bars(axis: Any, results: Results, key: str, title: str) -> None:
    names = [
        (profile, trace)
        for profile, runs in results.items()
        for trace in dict.fromkeys(run["trace"] for run in runs)
    ]
    for offset, policy in zip((-0.2, 0.2), COLORS, strict=True):
        values = [_run(results[profile], trace, policy)[key] for profile, trace in names]
        places = [place + offset for place in range(len(names))]
        axis.barh(places, values, height=0.4, color=COLORS[policy], label=policy)
    axis.set_yticks(range(len(names)), [f"{t} ({p})" for p, t in names], fontsize=7)
    axis.invert_yaxis()
    axis.set_title(title)
    axis.legend()


def _run(runs: list[dict[str, Any]], trace: str, policy: str) -> dict[str, Any]:
    return next(run for run in runs if (run["trace"], run["policy"]) == (trace, policy))
