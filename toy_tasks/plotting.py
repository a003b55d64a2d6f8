"""Figures that can be read in grey: every line has its own dash pattern and marker, every bar its hatch, beside its colour."""

import io
import itertools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from .records import Curve, Metric, write_atomically
from .statistics import Interval, interval

# Okabe and Ito's palette, which the colour-blind can tell apart, from dark to light
COLOURS = ("#000000", "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
DASHES = ("-", "--", "-.", ":", (0, (5, 1, 1, 1, 1, 1)), (0, (8, 3)), (0, (1, 3)))
MARKERS = ("o", "s", "^", "D", "v", "P", "X")
BAR_COLOURS = ("#0072B2", "#F0E442", "#CC79A7", "#FFFFFF")  # dark, light, middle, white
HATCHES = ("", "///", "...", "xxx")

# Sizes for a figure shown 700 to 800 pixels wide; texts become outlines, so that every reader sees the same
_STYLE: dict[str, Any] = {
    "font.size": 11,
    "axes.titlesize": 11.5,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.alpha": 0.3,
    "svg.hashsalt": "loracle",  # the same bytes for the same figure
}


def make_figure(columns: int, title: str, *, rows: int = 1, height: float = 3.6) -> tuple[Figure, list[Axes]]:
    """A figure of rows x columns panels (row by row) under one title, which should answer one question. No window opens."""
    with matplotlib.rc_context(_STYLE):  # type: ignore[arg-type]
        figure = Figure(figsize=(4.2 * columns, height * rows), layout="constrained")
        axes = figure.subplots(rows, columns, squeeze=False)
    figure.suptitle(title, fontsize=14)
    return figure, list(axes.flat)


def line_style(i: int) -> dict[str, Any]:
    """Colour, dashes and marker of the i-th line."""
    return {"color": COLOURS[i % 7], "linestyle": DASHES[i % 7], "marker": MARKERS[i % 7]}


def draw_curve(ax: Axes, curve: Curve, label: str, i: int) -> None:
    """Mean over seeds along the training, with the 95 % interval as a band; it ends where a value was not finite."""
    rows = list(itertools.takewhile(all_finite, (interval(values) for values in zip(*curve.values, strict=True))))
    steps = curve.steps[: len(rows)]
    mean, low, high = np.array(rows, dtype=float).reshape(-1, 3).T
    # Markers start at different steps, so that lines that coincide can still be told apart
    ax.plot(steps, mean, label=label, markevery=(i % 5 / 40, 0.125), **line_style(i))
    ax.fill_between(steps, low, high, color=COLOURS[i % 7], alpha=0.15, linewidth=0)


def draw_points(ax: Axes, x: Sequence[float], metrics: Sequence[Metric], label: str, i: int) -> None:
    """Means against `x`, with 95 % intervals as error bars; what was not finite is left out."""
    mean, half = _mean_and_half(metrics)
    ax.errorbar(x, mean, yerr=half, label=label, capsize=3, **line_style(i))


def draw_bars(ax: Axes, groups: Sequence[str], series: Mapping[str, Sequence[Metric]]) -> None:
    """Bars of means with 95 % intervals: a bar of each series, whose metrics are in the order of the groups, side by side."""
    width = 0.8 / len(series)
    for i, (name, metrics) in enumerate(series.items()):
        mean, half = _mean_and_half(metrics)
        at = np.arange(len(groups)) + (i - (len(series) - 1) / 2) * width
        ax.bar(at, mean, width, yerr=half, label=name, capsize=3, color=BAR_COLOURS[i], hatch=HATCHES[i], edgecolor="black")
    ax.set_xticks(range(len(groups)), list(groups))
    ax.grid(axis="x", visible=False)


def draw_rows(ax: Axes, labels: Sequence[str], series: Mapping[str, Sequence[Metric]]) -> None:
    """Means with 95 % intervals along x, a row for each label from the top; the series of a row lie closely under one another."""
    for i, (name, metrics) in enumerate(series.items()):
        mean, half = _mean_and_half(metrics)
        at = np.arange(len(labels)) + (i - (len(series) - 1) / 2) * 0.3
        style = {**line_style(i), "linestyle": "", "markerfacecolor": "white" if i % 2 else COLOURS[i % 7]}
        ax.errorbar(mean, at, xerr=half, label=name, capsize=2, markersize=5, **style)
    ax.set_yticks(range(len(labels)), list(labels))
    ax.set_ylim(len(labels) - 0.5, -0.5)


def all_finite(row: Interval) -> bool:
    """Whether a mean and its interval exist."""
    return row.mean is not None


def _mean_and_half(metrics: Sequence[Metric]) -> tuple[Any, Any]:
    """Means and half widths of the intervals as arrays, NaN (which matplotlib leaves out) where there is none."""
    rows = np.array([(metric.mean, metric.low) for metric in metrics], dtype=float).reshape(-1, 2)
    return rows[:, 0], rows[:, 0] - rows[:, 1]


def save(figure: Figure, path: Path) -> None:
    """Save as SVG or PNG, by the suffix of `path`, atomically and with the same bytes for the same figure."""
    buffer = io.BytesIO()
    kind = path.suffix.removeprefix(".")
    with matplotlib.rc_context(_STYLE):  # type: ignore[arg-type]
        figure.savefig(buffer, format=kind, dpi=150, metadata={"Date": None} if kind == "svg" else None)
    write_atomically(path, buffer.getvalue())
