"""The figure of a table: every share of every model with its interval, model below model in the table's order."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from pipeline.report.comparison import Row
from pipeline.report.figures import COLOURS, GREY, GRID, INK, new_axes, percent, png
from pipeline.report.files import write_bytes

NAME = "scores.png"


def write_scores(rows: Sequence[Row], output_dir: Path) -> None:
    """Writes scores.png of two models or more, unless they are points of a sweep. Controls are hollow and grey."""
    shares = list(dict.fromkeys(name for row in rows for name in row.shares))
    if len(rows) < 2 or not shares or any(row.poison_percent is not None for row in rows):
        return
    figure, grid = new_axes(3.0 * len(shares) + 2.2, 0.32 * len(rows) + 1.1, 1, len(shares))
    for axes, share in zip(grid, shares, strict=True):
        axes.set_axisbelow(True)
        axes.grid(axis="x", color=GRID, linewidth=0.8)
        for place, row in enumerate(rows):
            if share not in row.shares:
                continue
            (x,), xerr = percent([row.shares[share]])
            colour = GREY if row.matches else COLOURS[0]
            axes.errorbar(
                [x], [place], xerr=xerr, color=colour, marker="o", mec=colour, mfc="white" if row.matches else colour,
                markersize=6, linestyle="none", elinewidth=1.4, capsize=2.5, clip_on=False, zorder=3,
            )  # fmt: skip
        axes.set_title(f"{share.replace('_', ' ')}, %", color=INK, fontsize=10)
        axes.set_xlim(-3, 103)
        axes.set_yticks(range(len(rows)), [row.name.replace("$", r"\$") for row in rows] if axes is grid[0] else [])
        axes.set_ylim(len(rows) - 0.5, -0.5)
    write_bytes(output_dir / NAME, png(figure))
