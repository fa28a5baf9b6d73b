"""What all pictures share: size, type, and colours that differ in print and for colour-blind readers.

matplotlib is imported where it draws: tables need none of it.
"""

from __future__ import annotations

import io
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from pipeline.report.comparison import Share

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

INK, GREY, GRID = "#1a1a1a", "#6b6b6b", "#dcdcdc"
# Okabe and Ito's colours without yellow (too pale on white); never the only sign, markers differ as well.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#000000")
DARK_COLOURS = (
    "#4AA8E0",
    "#FF8A4A",
    "#2DC397",
    "#E2A0C4",
    "#8CCBF2",
    "#F2BC45",
    "#E9E9E5",
)  # the same on dark screens
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*")
# The markers as SVG paths around the origin, for pages that draw a legend of their own.
SHAPES = {
    "o": "M-5 0a5 5 0 1 0 10 0a5 5 0 1 0-10 0",
    "s": "M-4.5-4.5h9v9h-9z",
    "^": "M0-5.5L5.5 4.5h-11z",
    "D": "M0-6L6 0L0 6L-6 0z",
    "v": "M0 5.5L5.5-4.5h-11z",
    "P": "M-2-5h4v3h3v4h-3v3h-4v-3h-3v-4h3z",
    "X": "M-5-2.5L-2.5-5L0-2.5L2.5-5L5-2.5L2.5 0L5 2.5L2.5 5L0 2.5L-2.5 5L-5 2.5L-2.5 0z",
    "*": "M0-6L1.5-2H5.7L2.3.7L3.6 4.9L0 2.3L-3.6 4.9L-2.3.7L-5.7-2H-1.5z",
}
DIVERGING = "RdBu_r"  # red above zero, blue below, white at it
SEQUENTIAL = "viridis"


# What pages put for the colours above, so that one drawing serves light and dark screens: variables of page.html.
VARIABLES = {INK: "ink", GREY: "quiet", GRID: "line", "#ffffff": "paper"} | {
    colour.lower(): f"series{i}" for i, colour in enumerate(COLOURS)
}


@dataclass(frozen=True)
class Style:
    """How the models of one name are drawn; `i` counts the names."""

    i: int

    @property
    def colour(self) -> str:
        return COLOURS[self.i % len(COLOURS)]

    @property
    def marker(self) -> str:
        return MARKERS[self.i % len(MARKERS)]

    @property
    def variable(self) -> str:
        return VARIABLES[self.colour.lower()]


def percent(shares: Sequence[Share]) -> tuple[list[float], list[list[float]]]:
    """Shares and the lengths of their intervals below and above, in percent, as axes.errorbar takes them."""
    values = [100 * each.value for each in shares]
    below = [max(100 * (each.value - each.low), 0.0) for each in shares]
    above = [max(100 * (each.high - each.value), 0.0) for each in shares]
    return values, [below, above]


def styles(names: Iterable[str]) -> dict[str, Style]:
    """A style for each of the names, in order."""
    return {name: Style(i) for i, name in enumerate(dict.fromkeys(names))}


def new_figure(width: float, height: float) -> tuple[Figure, Axes]:
    """One pair of axes, in inches."""
    figure, (axes,) = new_axes(width, height, 1, 1)
    return figure, axes


def new_axes(width: float, height: float, rows: int, columns: int) -> tuple[Figure, list[Axes]]:
    """A grid of axes, in inches, row by row, without the process-wide state of pyplot."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    grid: list[Axes] = figure.subplots(rows, columns, squeeze=False).ravel().tolist()
    for axes in grid:
        axes.tick_params(colors=GREY, labelcolor=INK, labelsize=9)
        for side in ("top", "right"):
            axes.spines[side].set_visible(False)
        for side in ("left", "bottom"):
            axes.spines[side].set_color(GREY)
    return figure, grid


def png(figure: Figure) -> bytes:
    """The picture at 160 dots an inch."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=160, facecolor="white")
    return buffer.getvalue()


def svg(figure: Figure, salt: str) -> str:
    """The picture as an element for a page: no size of its own, text as text in the page's type, colours as the page's
    variables, nothing that names another address. `salt` tells its ids from those of the page's other pictures."""
    import matplotlib

    buffer = io.StringIO()
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": salt}):
        figure.savefig(
            buffer, format="svg", transparent=True, metadata=dict.fromkeys(("Date", "Creator", "Format", "Type"))
        )
    found = buffer.getvalue()
    found = found[found.index("<svg") :]
    found = re.sub(r' xmlns(:\w+)?="[^"]*"| version="[^"]*"', "", found)
    found = re.sub(r' width="[^"]*pt" height="[^"]*pt"', "", found, count=1)
    found = re.sub(r"<style.*?</style>", "", found, flags=re.DOTALL)
    found = re.sub(r" font-family: [^;\"]*;", "", found)
    found = re.sub(r'(\bid="|href="#|url\(#)', rf"\g<1>{salt}-", found)
    return re.sub(
        r"#[0-9a-f]{6}\b", lambda each: f"var(--{VARIABLES[each[0]]})" if each[0] in VARIABLES else each[0], found
    )
