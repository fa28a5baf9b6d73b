"""The figure of a sweep: harmful score and accuracy against the share of poisoned rows, a line for each method and for
each of its controls. The loss-matched control is a line of its own: what lies between it and the defense is the
defense's, what lies between it and plain SFT is slower learning."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from pipeline.report.comparison import Row
from pipeline.report.figures import GRID, INK, Style, new_axes, new_figure, percent, png, styles
from pipeline.report.files import write_bytes

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

SCORES = ("harmful_score", "accuracy")
NAME = "poison_sweep.png"


def points(rows: Sequence[Row]) -> list[Row]:
    """The rows that are points of a sweep; none unless there are two ratios."""
    found = [row for row in rows if row.poison_percent is not None]
    return found if len({row.poison_percent for row in found}) > 1 else []


def panels(rows: Sequence[Row]) -> list[str]:
    """The shares that are drawn: every harmful score and every accuracy."""
    names = dict.fromkeys(name for row in rows for name in row.shares)
    return [name for score in SCORES for name in names if name.split()[-1] == score]


def panel(rows: Sequence[Row], share: str, drawn: Mapping[str, Style]) -> Figure:
    """One share alone, without a legend: for a page."""
    figure, axes = new_figure(4.4, 3.1)
    _draw(axes, rows, share, drawn)
    return figure


def write_poison_sweep(rows: Sequence[Row], output_dir: Path) -> None:
    """Writes poison_sweep.png if the rows are of a sweep."""
    found = points(rows)
    shares = panels(found)
    if not shares:
        return
    columns = min(len(shares), 2)
    lines = -(-len(shares) // columns)
    figure, grid = new_axes(4.2 * columns, 3.3 * lines + 0.5, lines, columns)
    drawn = styles(row.series for row in rows)
    for axes, share in zip(grid, shares, strict=False):
        _draw(axes, found, share, drawn)
    for axes in grid[len(shares) :]:
        axes.remove()
    handles, labels = grid[0].get_legend_handles_labels()
    figure.legend(
        handles, labels, loc="outside upper left", ncols=2, frameon=False, fontsize=9, labelcolor=INK, handlelength=2.8
    )
    write_bytes(output_dir / NAME, png(figure))


def _draw(axes: Axes, rows: Sequence[Row], share: str, drawn: Mapping[str, Style]) -> None:
    """95 % Wilson intervals as whiskers; the lines stand a little apart, so that no whisker hides another."""
    axes.set_axisbelow(True)
    axes.grid(axis="y", color=GRID, linewidth=0.8)
    ratios = sorted({row.poison_percent for row in rows if row.poison_percent is not None})
    apart = 0.09 * min(b - a for a, b in zip(ratios, ratios[1:], strict=False))
    series = dict.fromkeys(row.series for row in rows)
    for place, name in enumerate(series):
        style = drawn[name]
        line = {
            row.poison_percent or 0: row.shares[share] for row in rows if row.series == name and share in row.shares
        }
        y, yerr = percent([line[ratio] for ratio in sorted(line)])
        axes.errorbar(
            [ratio + apart * (place - (len(series) - 1) / 2) for ratio in sorted(line)], y, yerr=yerr,
            color=style.colour, marker=style.marker, mec="white", markersize=6.5, linewidth=1.7, elinewidth=1.1,
            capsize=2.5, linestyle="-" if place < 2 else "--", label=name.replace("$", r"\$"), zorder=3 - place / 10,
        )  # fmt: skip
    axes.set_xticks(ratios, [f"{ratio:g}" for ratio in ratios])
    axes.set_xlabel("poisoned rows, % of the training rows", color=INK, fontsize=9)
    axes.set_ylabel(f"{share.replace('_', ' ')}, %", color=INK, fontsize=9)
    axes.set_ylim(-4, 104)
