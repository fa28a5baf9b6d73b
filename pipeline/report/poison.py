"""The figure of a sweep: harmful score and accuracy against the share of poisoned rows, a line for each method and for
each of its controls. The loss-matched control is a line of its own: what lies between it and the defense is the
defense's, what lies between it and plain SFT is slower learning."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from pipeline.report.comparison import Row
from pipeline.report.figures import GRID, INK, Style, new_axes, new_figure, percent, png, styles
from pipeline.report.files import write_bytes
from pipeline.report.trials import trials

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

SCORES = ("harmful_score", "accuracy")
NAME = "poison_sweep.png"
CROWDED = 2  # more defenses than this get a panel each


@dataclass(frozen=True)
class Panel:
    """One share of the models that are compared with each other; `legend`: not shared with the other panels."""

    title: str
    share: str
    rows: list[Row]
    drawn: Mapping[str, Style]
    legend: bool

    def figure(self) -> Figure:
        """This panel alone: for a page."""
        figure, axes = new_figure(4.4, 3.1)
        self.draw(axes)
        return figure

    def draw(self, axes: Axes) -> None:
        """Into axes that are given."""
        _draw(axes, self.rows, self.share, self.drawn)
        if self.legend:
            axes.set_title(self.title, color=INK, fontsize=10)
            axes.legend(frameon=False, fontsize=7, labelcolor=INK, handlelength=2.4)


def points(rows: Sequence[Row]) -> list[Row]:
    """The rows that are points of a sweep; none unless there are two ratios."""
    found = [row for row in rows if row.poison_percent is not None]
    return found if len({row.poison_percent for row in found}) > 1 else []


def panels(rows: Sequence[Row], drawn: Mapping[str, Style]) -> list[Panel]:
    """Every harmful score and every accuracy, all models in one; of many defenses, or under several settings, the
    harmful scores alone: each defense that has several ratios with plain training and its controls, and where nothing
    has controls each setting."""
    found = points(rows)
    shares = dict.fromkeys(name for row in found for name in row.shares)
    chosen = [name for score in SCORES for name in shares if name.split()[-1] == score]
    groups: dict[str, list[Row]] = {}
    for trial in trials(found):
        beside = [] if trial.plain is None else [trial.plain]
        groups.setdefault(trial.defense.series, []).extend([*beside, trial.defense, *trial.controls])
    one_setting = len({row.setting for row in found}) <= 1
    if not groups and not one_setting:
        for row in found:
            groups.setdefault(row.setting or "", []).append(row)
    groups = {name: own for name, own in groups.items() if len({row.poison_percent for row in own}) > 1}
    if len(groups) <= CROWDED and one_setting:
        return [Panel(share, share, found, drawn, legend=False) for share in chosen]
    return [
        Panel(name, share, own, styles(row.model for row in own), legend=True)
        for share in chosen
        if share.split()[-1] == SCORES[0]
        for name, own in groups.items()
    ]


def write_poison_sweep(rows: Sequence[Row], output_dir: Path) -> None:
    """Writes poison_sweep.png if the rows are of a sweep."""
    found = panels(rows, styles(row.model for row in points(rows)))
    if not found:
        return
    most, width = (4, 3.5) if found[0].legend else (2, 4.2)
    columns = min(len(found), most)
    lines = -(-len(found) // columns)
    figure, grid = new_axes(width * columns, 3.3 * lines + 0.5, lines, columns)
    for axes, panel in zip(grid, found, strict=False):
        panel.draw(axes)
    for axes in grid[len(found) :]:
        axes.remove()
    if not found[0].legend:
        handles, labels = grid[0].get_legend_handles_labels()
        figure.legend(
            handles, labels, loc="outside upper left", ncols=2, frameon=False, fontsize=9, labelcolor=INK,
            handlelength=2.8,
        )  # fmt: skip
    write_bytes(output_dir / NAME, png(figure))


def _draw(axes: Axes, rows: Sequence[Row], share: str, drawn: Mapping[str, Style]) -> None:
    """95 % Wilson intervals as whiskers; the lines stand a little apart, so that no whisker hides another."""
    axes.set_axisbelow(True)
    axes.grid(axis="y", color=GRID, linewidth=0.8)
    ratios = sorted({row.poison_percent for row in rows if row.poison_percent is not None})
    apart = 0.09 * min(b - a for a, b in zip(ratios, ratios[1:], strict=False))
    models = dict.fromkeys(row.model for row in rows)
    for place, name in enumerate(models):
        style = drawn[name]
        line = {
            row.poison_percent or 0: row.shares[share] for row in rows if row.model == name and share in row.shares
        }
        y, yerr = percent([line[ratio] for ratio in sorted(line)])
        axes.errorbar(
            [ratio + apart * (place - (len(models) - 1) / 2) for ratio in sorted(line)], y, yerr=yerr,
            color=style.colour, marker=style.marker, mec="white", markersize=6.5, linewidth=1.7, elinewidth=1.1,
            capsize=2.5, linestyle="-" if place < 2 else "--", label=name.replace("$", r"\$"), zorder=3 - place / 10,
        )  # fmt: skip
    axes.set_xticks(ratios, [f"{ratio:g}" for ratio in ratios])
    axes.set_xlabel("poisoned rows, % of the training rows", color=INK, fontsize=9)
    axes.set_ylabel(f"{share.replace('_', ' ')}, %", color=INK, fontsize=9)
    axes.set_ylim(-4, 104)
