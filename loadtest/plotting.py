"""One style for all plots."""

from __future__ import annotations

import base64
import io
from collections.abc import Iterable
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure

DPI = 110


def panels(count: int, height: float) -> tuple[Figure, list[Axes]]:
    """Panels above each other that share the x axis; `height` in inches is that of all of them."""
    figure, axes = plt.subplots(count, 1, figsize=(9, height), sharex=True, layout="constrained")
    return figure, list(axes)


def finish(axes: Iterable[Axes]) -> None:
    """Adds a grid, and a legend where something has a label; y axes start at 0."""
    for panel in axes:
        panel.set_ylim(bottom=0)
        panel.grid(alpha=0.3)
        if panel.get_legend_handles_labels()[0]:
            panel.legend(loc="upper right", fontsize="small")


def save(figure: Figure, path: Path) -> None:
    figure.savefig(path, dpi=DPI)
    plt.close(figure)


def data_url(figure: Figure) -> str:
    """The figure as a PNG that a page holds inline."""
    file = io.BytesIO()
    figure.savefig(file, format="png", dpi=DPI)
    plt.close(figure)
    return f"data:image/png;base64,{base64.b64encode(file.getvalue()).decode()}"
