"""What safety costs in skill: harmful score against task accuracy, a point a model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import product
from typing import TYPE_CHECKING

from pipeline.report.comparison import Row
from pipeline.report.figures import GREY, GRID, INK, Style, new_figure, percent

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def planes(rows: Sequence[Row]) -> list[tuple[str, str]]:
    """Each harmful score with each accuracy that some row has both of."""
    names = dict.fromkeys(name for row in rows for name in row.shares)
    harmful, accuracy = ([name for name in names if name.split()[-1] == s] for s in ("harmful_score", "accuracy"))
    return [pair for pair in product(harmful, accuracy) if any(set(pair) <= row.shares.keys() for row in rows)]


def tradeoff(rows: Sequence[Row], harmful: str, accuracy: str, drawn: Mapping[str, Style]) -> Figure:
    """95 % Wilson intervals both ways; the points of one line of a sweep are joined in the order of the ratio."""
    figure, axes = new_figure(4.4, 3.4)
    axes.set_axisbelow(True)
    axes.grid(color=GRID, linewidth=0.8)
    found = [row for row in rows if harmful in row.shares and accuracy in row.shares]
    for name in dict.fromkeys(row.series for row in found):
        style = drawn[name]
        line = sorted((row for row in found if row.series == name), key=lambda row: row.poison_percent or 0)
        x, xerr = percent([row.shares[accuracy] for row in line])
        y, yerr = percent([row.shares[harmful] for row in line])
        axes.errorbar(
            x, y, xerr=xerr, yerr=yerr, color=style.colour, marker=style.marker, mec="white", markersize=8,
            linewidth=0.8, elinewidth=1.1, capsize=2.5, zorder=3,
        )  # fmt: skip
        if len(line) > 1:
            for row, right, up in zip(line, x, y, strict=True):
                text = f"{row.poison_percent:g}"
                axes.annotate(text, (right, up), xytext=(5, 4), textcoords="offset points", fontsize=7, color=GREY)
    axes.set_xlabel(f"{accuracy.replace('_', ' ')}, %: higher is better", color=INK, fontsize=9)
    axes.set_ylabel(f"{harmful.replace('_', ' ')}, %: lower is better", color=INK, fontsize=9)
    axes.set_xlim(-4, 104)
    axes.set_ylim(-4, 104)
    axes.annotate(
        "safe and skilled", (1, 0), xycoords="axes fraction", xytext=(-4, 4), textcoords="offset points",
        ha="right", fontsize=8, color=GREY, style="italic",
    )  # fmt: skip
    return figure
