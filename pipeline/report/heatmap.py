"""The sink divergence of every head as a picture: layers x heads, red where harmful texts pay the sink more."""

from __future__ import annotations

import io
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipeline.report.figures import DIVERGING, GREY, INK, new_figure, png


def limit(divergence: NDArray[np.float64]) -> float:
    """Where the colours end, on both sides of zero: the 99th percentile of |d|, so that a single head does not turn
    all others white. Positive even if every d is zero."""
    magnitudes = np.abs(divergence)
    found = float(np.percentile(magnitudes, 99, method="higher"))
    return found or float(magnitudes.max()) or 1.0


def ticks(count: int) -> range:
    """Which layers or heads to number: all, or at round distances."""
    return range(0, count, next(step for step in (1, 2, 5, 10, 20, 50, count) if count / step <= 14))


def mark_colour(share: float) -> str:
    """What is legible on the colour of a divergence, given as a share of the limit."""
    return "#ffffff" if abs(share) > 0.6 else INK


def colours(values: NDArray[np.float64]) -> list[str]:
    """#rrggbb of values in -1..1, cut there."""
    import matplotlib
    from matplotlib.colors import to_hex

    return [to_hex(each) for each in matplotlib.colormaps[DIVERGING](values.clip(-1, 1) / 2 + 0.5)]


def thumbnail(divergence: NDArray[np.float64], end: float) -> bytes:
    """PNG of a divergence [L,H], one dot a head: layers from left to right, heads from top to bottom; the colours end
    at -end and end."""
    import matplotlib
    from matplotlib.image import imsave

    buffer = io.BytesIO()
    imsave(buffer, matplotlib.colormaps[DIVERGING]((divergence.T / end).clip(-1, 1) / 2 + 0.5), format="png")
    return buffer.getvalue()


def heatmap(found: dict[str, Any], title: str) -> bytes:
    """PNG of a measured model, `found` as in sinks.json; + and - mark heads that are significantly positive and
    negative."""
    divergence, significant = np.array(found["divergence"]), np.array(found["significant"])
    layers, heads = divergence.shape
    cell = min(0.3, 11 / heads)
    figure, axes = new_figure(max(cell * heads + 1.9, 4.6), max(cell * layers + 1.3, 2.4))
    end = limit(divergence)
    image = axes.imshow(divergence, cmap=DIVERGING, vmin=-end, vmax=end, interpolation="nearest")
    for layer, head in zip(*significant.nonzero(), strict=True):
        mark, colour = "+" if significant[layer, head] > 0 else "_", mark_colour(divergence[layer, head] / end)
        axes.plot(head, layer, mark, color=colour, markersize=cell * 32, markeredgewidth=cell * 6.5)
    axes.set_xlabel("head", color=INK)
    axes.set_ylabel("layer", color=INK)
    axes.set_xticks(ticks(heads))
    axes.set_yticks(ticks(layers))
    for spine in axes.spines.values():
        spine.set_visible(False)
    axes.set_title(title, color=INK, fontsize=11, loc="left")
    beyond = {(True, True): "both", (True, False): "max", (False, True): "min", (False, False): "neither"}
    extend = beyond[bool(divergence.max() > end), bool(divergence.min() < -end)]
    bar = figure.colorbar(image, ax=axes, extend=extend, extendfrac=0.03, aspect=28, fraction=0.06, pad=0.02)
    bar.set_label("sink divergence d", color=INK, fontsize=9)
    bar.ax.tick_params(colors=GREY, labelcolor=INK, labelsize=8)
    figure.supxlabel("+ significantly positive    − significantly negative", color=INK, fontsize=9)
    return png(figure)
