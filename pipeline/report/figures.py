"""What all pictures share: size, type, and colours that differ in print and for colour-blind readers.

matplotlib is imported where it draws: tables need none of it.
"""

from __future__ import annotations

import io
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

INK, GREY, GRID = "#1a1a1a", "#6b6b6b", "#dcdcdc"
# Okabe and Ito's colours without yellow (too pale on white); never the only sign, markers differ as well.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#000000")
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*")
DIVERGING = "RdBu_r"  # red above zero, blue below, white at it
SEQUENTIAL = "viridis"


def new_figure(width: float, height: float) -> tuple[Figure, Axes]:
    """One pair of axes, in inches, without the process-wide state of pyplot."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    axes = figure.subplots()
    axes.tick_params(colors=GREY, labelcolor=INK, labelsize=9)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    for side in ("left", "bottom"):
        axes.spines[side].set_color(GREY)
    return figure, axes


def png(figure: Figure) -> bytes:
    """The picture at 160 dots an inch."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=160, facecolor="white")
    return buffer.getvalue()
