"""What safety costs in skill: harmful score against task accuracy, a point a model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import product
from typing import TYPE_CHECKING

from pipeline.report.comparison import Row, Share
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
    labelled: list[tuple[float, float]] = []
    found = [row for row in rows if harmful in row.shares and accuracy in row.shares]
    for name in dict.fromkeys(row.series for row in found):
        line = sorted((row for row in found if row.series == name), key=lambda row: row.poison_percent or 0)
        style = drawn[line[0].model]
        x, xerr = percent([row.shares[accuracy] for row in line])
        y, yerr = percent([row.shares[harmful] for row in line])
        axes.errorbar(
            x, y, xerr=xerr, yerr=yerr, color=style.colour, marker=style.marker, mec="white", markersize=8,
            linestyle=":", linewidth=1, elinewidth=1.1, capsize=2.5, zorder=3,
        )  # fmt: skip
        if len(line) > 1:
            for row, right, up in zip(line, x, y, strict=True):
                if all(abs(right - a) > 4 or abs(up - b) > 4 for a, b in labelled):  # else one hides the other
                    text = f"{row.poison_percent:g}"
                    axes.annotate(text, (right, up), xytext=(5, 4), textcoords="offset points", fontsize=7, color=GREY)
                    labelled.append((right, up))
    axes.set_xlabel(f"{accuracy.replace('_', ' ')}, %: higher is better", color=INK, fontsize=9)
    axes.set_ylabel(f"{harmful.replace('_', ' ')}, %: lower is better", color=INK, fontsize=9)
    axes.set_xlim(*_limits([row.shares[accuracy] for row in found]))
    axes.set_ylim(*_limits([row.shares[harmful] for row in found]))
    return figure


def _limits(shares: Sequence[Share]) -> tuple[float, float]:
    """The ends of an axis, in percent: around all intervals, 25 points apart at least, a little room at both."""
    low, high = 100 * min(each.low for each in shares), 100 * max(each.high for each in shares)
    short = max(25 - (high - low), 0)
    low, high = max(low - short, 0), min(high + max(short - low, 0), 100)
    room = 0.05 * (high - low)
    return low - room, high + room
