"""The page of a realignment, realign.html: the rank of every safety subspace by layer, and each tensor's update."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from pipeline.report.figures import GRID, INK, new_figure, styles, svg
from pipeline.report.html import render


def realign_page(found: Mapping[str, Any]) -> str:
    """found: what realign.json holds."""
    maps = [each for tensor in found["tensors"] for each in tensor["maps"]]
    return render(
        "realign_page.html",
        {"number": _number, "plain": lambda name: str(name).replace("_", " ")},
        found=found,
        picture=_ranks(maps) if maps else None,
    )


def _ranks(maps: Sequence[Mapping[str, Any]]) -> str:
    """Rank over n against the layer, a line a projection: a share, since a map of few rows has few directions."""
    from matplotlib.ticker import MaxNLocator

    figure, axes = new_figure(7.2, 4.2)
    axes.set_axisbelow(True)
    axes.grid(color=GRID, linewidth=0.8)
    drawn = styles(each["projection"] for each in maps)
    for name, style in drawn.items():
        points = sorted((each["layer"], 100 * each["rank"] / each["n"]) for each in maps if each["projection"] == name)
        axes.plot(
            [layer for layer, _ in points],
            [share for _, share in points],
            style.marker,
            linestyle="-",
            color=style.colour,
            markersize=5,
            linewidth=1.2,
            label=name.removesuffix("_proj"),
        )
    axes.set_xlabel("layer", color=INK)
    axes.set_ylabel("rank, % of all directions", color=INK)
    axes.set_ylim(bottom=0)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.legend(frameon=False, fontsize=9, ncols=len(drawn), loc="lower left", bbox_to_anchor=(0, 1))
    return svg(figure, "ranks")


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:.3g}"
