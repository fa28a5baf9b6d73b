"""Training curves: what metrics.jsonl of each run says about its losses, step by step."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from pipeline.report.comparison import Row
from pipeline.report.figures import GRID, INK, Style, new_figure
from pipeline.report.records import read_metrics

if TYPE_CHECKING:
    from matplotlib.figure import Figure

LOGGED = ("ce_loss", "loss")
"""Drawn where a run evaluated nothing: its training loss."""


@dataclass(frozen=True)
class Curve:
    """A metric of one run. model: the first that comes from the run. matched: (step, value) of checkpoints that were
    taken from it as controls, by the control's model."""

    model: str
    steps: list[int]
    values: list[float]
    matched: dict[str, tuple[int, float]]


def curves(rows: Sequence[Row]) -> dict[str, list[Curve]]:
    """The curves by metric: cross-entropies on evaluation rows, or else the training loss. A run that several rows
    name is drawn once; of several seeds the first."""
    runs: dict[Path, list[Row]] = {}
    for row in rows:
        for folder in row.folders.get("run", [])[:1]:
            runs.setdefault(folder.resolve(), []).append(row)
    found: dict[str, list[Curve]] = {}
    for folder, users in runs.items():
        lines = read_metrics(folder)
        evaluated = dict.fromkeys(key for line in lines for key in line if key.startswith("eval_"))
        names = list(evaluated) or [name for name in LOGGED if any(name in line for line in lines)][:1]
        for name in names:
            points = {line["step"]: line[name] for line in lines if _finite(line.get(name))}
            matched = {
                row.model: (match.step, points[match.step])
                for row in users
                for match in row.matches[:1]
                if match.metric == name and match.step in points
            }
            if len(points) > 1:
                curve = Curve(users[0].model, list(points), list(points.values()), matched)
                found.setdefault(name, []).append(curve)
    return found


def figure_of(found: Sequence[Curve], label: str, drawn: Mapping[str, Style]) -> Figure:
    """The curves of one metric; a control's marker stands where it was taken. Logarithmic above one decade."""
    from matplotlib.ticker import LogLocator, MaxNLocator, NullLocator, StrMethodFormatter

    figure, axes = new_figure(4.4, 3.0)
    axes.set_axisbelow(True)
    axes.grid(axis="y", color=GRID, linewidth=0.8)
    for curve in found:
        style = drawn[curve.model]
        axes.plot(curve.steps, curve.values, color=style.colour, linewidth=1.7, zorder=2)
        axes.plot(curve.steps[-1], curve.values[-1], style.marker, color=style.colour, mec="white", ms=6.5, zorder=3)
        for name, (step, value) in curve.matched.items():
            axes.plot(step, value, drawn[name].marker, color=drawn[name].colour, mec="white", ms=8, zorder=4)
    values = [value for curve in found for value in curve.values]
    if min(values) > 0 and max(values) > 10 * min(values):
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 3)))
        axes.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
        axes.yaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_xlabel("step", color=INK, fontsize=9)
    axes.set_ylabel(label, color=INK, fontsize=9)
    return figure


def _finite(value: object) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)
