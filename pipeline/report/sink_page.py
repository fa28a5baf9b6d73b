"""The pictures of a measurement beside its sinks.json: heatmap.png, over several checkpoints positive_heads.png and
hypothesis.png, and all of it on one page, sinks.html, that needs no network."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from pipeline.report.comparison import Share
from pipeline.report.files import write_bytes
from pipeline.report.heatmap import colours, heatmap, limit, mark_colour, ticks
from pipeline.report.html import base64_text, render
from pipeline.report.positive_heads import Point, hypothesis, over_steps

STRONGEST = 50  # heads in the page's table


def write_pictures(found: dict[str, Any], output_dir: Path) -> None:
    """found: what sinks.json holds. Pictures of an earlier measurement that this one has not are removed."""
    checkpoints, heads = found["checkpoints"], np.array(found["divergence"]).size
    pictures = {"heatmap.png": heatmap(found, name_of(found))}
    if len(checkpoints) > 1:
        pictures["positive_heads.png"] = over_steps(
            [each["step"] for each in checkpoints],
            [round(each["positive_heads"] * heads) for each in checkpoints],
            [each["significant_positive_heads"] for each in checkpoints],
            heads,
        )
    judged = [each for each in checkpoints if "harmful_score" in each]
    if len(judged) > 1:
        pictures["hypothesis.png"] = hypothesis(
            [
                Point(each["checkpoint"], [each["positive_heads"]], Share(**each["harmful_score"]), each["step"])
                for each in judged
            ]
        )
    for name in ("heatmap.png", "positive_heads.png", "hypothesis.png"):
        if name in pictures:
            write_bytes(output_dir / name, pictures[name])
        else:
            (output_dir / name).unlink(missing_ok=True)
    write_bytes(output_dir / "sinks.html", page(found, pictures).encode())


def name_of(found: Mapping[str, Any]) -> str:
    """A measured model as people call it: its folder's name, and the checkpoint's or the adapter's."""
    parts = [Path(found["model"]).name, found["checkpoint"], found["adapter"] and Path(found["adapter"]).name]
    return " / ".join(dict.fromkeys(part for part in parts if part))


def page(found: dict[str, Any], pictures: Mapping[str, bytes]) -> str:
    """The HTML page. pictures: PNGs by file name; those over checkpoints are embedded."""
    layers, heads = np.array(found["divergence"]).shape
    cells = list(_cells(found))
    return render(
        "sink_page.html",
        {"p_value": _p_value},
        name=name_of(found),
        found=found,
        layers=layers,
        heads=heads,
        cells=cells,
        strongest=sorted(cells, key=lambda cell: -abs(cell["d"]))[:STRONGEST],
        size=22 if heads <= 16 else 16 if heads <= 40 else 11,
        layer_ticks=ticks(layers),
        head_ticks=ticks(heads),
        limit=limit(np.array(found["divergence"])),
        images={name: base64_text(content) for name, content in pictures.items()},
    )


def _cells(found: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """Every head's numbers and colour, layer by layer."""
    names = (
        "divergence", "standard_error", "harmful_mean", "harmless_mean", "positive_pairs", "p_value", "p_holm",
        "significant",
    )  # fmt: skip
    arrays = [np.array(found[name]) for name in names]
    shares = (arrays[0] / limit(arrays[0])).ravel()
    for (layer, head), share, colour in zip(np.ndindex(arrays[0].shape), shares, colours(shares), strict=True):
        d, error, harmful, harmless, positive, p, p_holm, significant = (each[layer, head].item() for each in arrays)
        yield {
            "layer": layer, "head": head, "colour": colour, "mark": mark_colour(share), "d": d, "error": error,
            "harmful": harmful, "harmless": harmless, "positive": positive, "p": p, "p_holm": p_holm,
            "significant": significant,
        }  # fmt: skip


def _p_value(p: float) -> str:
    return "< 1e-300" if p < 1e-300 else f"{p:.2g}"
