"""report.html of a selection: how its scores go with loss, length and category, beside other selectors. No row's text
is on it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pipeline.report.figures import COLOURS, MARKERS, new_axes, new_figure, png
from pipeline.report.files import write_bytes
from pipeline.report.html import base64_text, render

LABELS = {
    "first_loss": "loss at the starting model (nats a token)",
    "last_loss": "loss at the last visit (nats a token)",
    "tokens": "trained tokens",
}


def write_page(report: Mapping[str, Any], lines: Sequence[Mapping[str, Any]], folder: Path) -> None:
    """report: what report.json holds; lines: those of scores.jsonl."""
    images = {"scores.png": scatter(lines), "steps.png": curves(report["steps"])}
    for name, content in images.items():
        write_bytes(folder / name, content)
    page = render(
        "selection_page.html",
        {},
        report=report,
        lines=lines,
        labels=LABELS,
        images={name: base64_text(content) for name, content in images.items()},
    )
    write_bytes(folder / "report.html", page.encode())


def scatter(lines: Sequence[Mapping[str, Any]]) -> bytes:
    """Score against each measure, a point a row."""
    figure, grid = new_axes(12, 3.8, 1, len(LABELS))
    for axes, (key, label) in zip(grid, LABELS.items(), strict=True):
        for i, (kept, name) in enumerate(((True, "kept"), (False, "left out"))):
            points = [(line[key], line["score"]) for line in lines if line["kept"] == kept]
            axes.scatter(
                [x for x, _ in points], [y for _, y in points], s=10, color=COLOURS[i], marker=MARKERS[i], label=name,
                alpha=0.6, linewidths=0,
            )  # fmt: skip
        axes.set_xlabel(label)
    grid[0].set_ylabel("score")
    grid[0].legend(frameon=False)
    return png(figure)


def curves(steps: Sequence[Mapping[str, float]]) -> bytes:
    """The losses of the two levels over the selector's steps."""
    figure, axes = new_figure(6.5, 3.2)
    for i, (key, name) in enumerate((("upper_loss", "guide rows, increment on"), ("row_loss", "rows to choose from"))):
        axes.plot(
            [each["step"] for each in steps], [each[key] for each in steps], color=COLOURS[i], marker=MARKERS[i],
            markersize=3, linewidth=1, label=name,
        )  # fmt: skip
    axes.set_xlabel("step of the selector's training")
    axes.set_ylabel("loss (nats a token)")
    axes.legend(frameon=False)
    return png(figure)
