"""Heads with positive sink divergence, over training and against the harmful score: the hypothesis of arXiv 2602.05228
drawn for the models at hand."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from pipeline.report.comparison import Row, Share, harmful_score
from pipeline.report.figures import COLOURS, GREY, GRID, INK, MARKERS, SEQUENTIAL, new_figure, png
from pipeline.report.files import write_bytes


@dataclass(frozen=True)
class Point:
    """One model. heads: share of heads with d > 0, of each seed. step: of a run's checkpoint."""

    label: str
    heads: list[float]
    score: Share
    step: int | None = None


def write_hypothesis(rows: Sequence[Row], output_dir: Path) -> None:
    """Writes hypothesis.png for the rows of a comparison that were both measured and judged, if there are two."""
    found = [
        Point(row.name, row.positive_heads.seeds, score)
        for row in rows
        if row.positive_heads is not None and (score := harmful_score(row.shares)) is not None
    ]
    if len(found) > 1:
        write_bytes(output_dir / "hypothesis.png", hypothesis(found))


def hypothesis(found: Sequence[Point]) -> bytes:
    """PNG: harmful score (95 % Wilson interval) against the share of positive heads (range of the seeds), a point a
    model. The checkpoints of one run are joined in order and coloured by step; other models have a marker each."""
    figure, axes = new_figure(7.2, 4.4)
    axes.set_axisbelow(True)
    axes.grid(color=GRID, linewidth=0.8)
    steps = [point.step for point in found if point.step is not None]
    x = [100 * statistics.fmean(point.heads) for point in found]
    y = [100 * point.score.value for point in found]
    for i, point in enumerate(found):
        colour = GREY if steps else COLOURS[i % len(COLOURS)]
        axes.errorbar(
            x[i], y[i], fmt="none", capsize=3, color=colour, linewidth=1.2, zorder=2,
            xerr=[[x[i] - 100 * min(point.heads)], [100 * max(point.heads) - x[i]]],
            yerr=[[max(y[i] - 100 * point.score.low, 0)], [max(100 * point.score.high - y[i], 0)]],
        )  # fmt: skip
        if not steps:
            marker = MARKERS[i % len(MARKERS)]
            axes.plot(x[i], y[i], marker, color=colour, mec="white", markersize=9, label=point.label, zorder=3)
    if steps:
        axes.plot(x, y, color=GREY, linewidth=1, zorder=1)
        dots = axes.scatter(x, y, c=steps, cmap=SEQUENTIAL, s=60, edgecolors=INK, linewidths=0.8, zorder=3)
        bar = figure.colorbar(dots, ax=axes, fraction=0.05, pad=0.02)
        bar.set_label("step", color=INK, fontsize=9)
        bar.ax.tick_params(colors=GREY, labelcolor=INK, labelsize=8)
        for i in {0, len(found) - 1}:
            axes.annotate(
                found[i].label, (x[i], y[i]), xytext=(7, 7), textcoords="offset points", fontsize=9, color=INK,
                bbox={"boxstyle": "square,pad=0.1", "fc": "white", "ec": "none", "alpha": 0.85}, zorder=4,
            )  # fmt: skip
    else:
        figure.legend(loc="outside right upper", frameon=False, fontsize=9, labelcolor=INK)
    axes.set_xlabel("heads with positive sink divergence, % of all", color=INK)
    axes.set_ylabel("harmful score, %", color=INK)
    axes.set_ylim(-4, 104)
    axes.margins(x=0.12)
    return png(figure)


def over_steps(steps: Sequence[int], positive: Sequence[int], significant: Sequence[int], heads: int) -> bytes:
    """PNG: how many of `heads` heads are positive, and significantly so, at each measured step of a run."""
    from matplotlib.ticker import MaxNLocator

    figure, axes = new_figure(7.2, 3.6)
    axes.set_axisbelow(True)
    axes.grid(axis="y", color=GRID, linewidth=0.8)
    for values, label, style in ((positive, "d > 0", "-"), (significant, "significantly positive", "--")):
        i = 0 if values is positive else 1
        axes.plot(steps, values, style, color=COLOURS[i], marker=MARKERS[i], markersize=6, linewidth=1.8, label=label)
    axes.legend(frameon=False, fontsize=9, labelcolor=INK)
    axes.set_xlabel("step", color=INK)
    axes.set_ylabel(f"heads, of {heads}", color=INK)
    axes.set_ylim(bottom=0)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    return png(figure)
