"""The report: models side by side on one page that needs no network, report.html, and the same in text, report.md.

Numbers, names and settings only: texts of prompts and answers are not read.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from pipeline.report.comparison import Row, Share
from pipeline.report.controls import beyond_slower_learning
from pipeline.report.curves import curves, figure_of
from pipeline.report.figures import SHAPES, Style, styles, svg
from pipeline.report.files import write_bytes
from pipeline.report.heatmap import limit, thumbnail
from pipeline.report.html import base64_text, render
from pipeline.report.intervals import Z_95
from pipeline.report.paired import Paired, compare, p_text
from pipeline.report.poison import panels, points
from pipeline.report.provenance import provenance
from pipeline.report.records import read_json
from pipeline.report.summary import markdown_report
from pipeline.report.table import MISSING, cells, footnotes, share_tables
from pipeline.report.tradeoff import planes, tradeoff

# What a score is called, what it counts, and which way it is better.
SCORES = {
    "harmful_score": ("Harmful score", "prompts answered harmfully", "lower is better"),
    "over_refusal": ("Over-refusal", "harmless prompts refused", "lower is better"),
    "accuracy": ("Accuracy", "tasks solved", "higher is better"),
}


def write_report(rows: Sequence[Row], output_dir: Path) -> None:
    """Writes report.md and report.html of one model or several.

    Errors: ValueError for a file of a row that cannot be read, naming it.
    """
    found, unpaired = compare(rows)
    gate = [entry for row in rows for entry in _gate(row)]
    output_dir.mkdir(parents=True, exist_ok=True)
    text = markdown_report(rows, found, unpaired, gate)
    write_bytes(output_dir / "report.md", text.encode())
    write_bytes(output_dir / "report.html", _page(rows, found, unpaired, gate).encode())


def _page(
    rows: Sequence[Row], found: Sequence[Paired], unpaired: Sequence[str], gate: Sequence[dict[str, Any]]
) -> str:
    drawn = styles(row.model for row in rows)
    header, *lines = cells(rows)
    shared, models = provenance(rows)
    return render(
        "report_page.html",
        {"p_text": p_text, "points": _points, "plain": lambda name: str(name).replace("_", " ")},
        title=_title(rows),
        rows=rows,
        drawn=drawn,
        shapes=SHAPES,
        gate=gate,
        attacked=list(dict.fromkeys(row.model for row, each in zip(rows, models, strict=True) if each.attacked)),
        scores=list(_scores(rows)),
        sweep=_sweep(rows, drawn),
        share_tables=share_tables(rows),
        controls=beyond_slower_learning(rows, found),
        differences=list(_differences(rows, found)),
        unpaired=unpaired,
        categories=list(_categories(rows)),
        harness=_harness(rows),
        tradeoffs=[
            svg(tradeoff(rows, *plane, drawn), f"tradeoff{i}") for i, plane in enumerate(planes(rows)) if len(rows) > 1
        ],
        maps=_maps(rows),
        curves=list(_curves(rows, drawn)),
        header=header,
        lines=lines,
        notes=footnotes(rows),
        shared=shared,
        models=models,
    )


def _title(rows: Sequence[Row]) -> str:
    names, swept = dict.fromkeys(row.model for row in rows), points(rows)
    if swept:
        return f"Safety and skill under {len({row.condition for row in swept})} conditions"
    return f"Safety and skill of {rows[0].name if len(names) == 1 else f'{len(names)} models'}"


def _gate(row: Row) -> Iterator[dict[str, Any]]:
    for folder in row.folders["assess"]:
        for entry in read_json(folder / "results.json").get("gate", []):
            yield {"model": row.name, **entry}


def _scores(rows: Sequence[Row]) -> Iterator[dict[str, Any]]:
    """Each score with the models that have it."""
    for name in dict.fromkeys(name for row in rows for name in row.shares):
        suite, _, metric = name.rpartition(" ")
        label, what, better = SCORES.get(metric, (metric.replace("_", " ").capitalize(), "", ""))
        having = [row for row in rows if name in row.shares]
        yield {
            "name": name,
            "label": label,
            "suite": suite,
            "what": what,
            "better": better,
            "n": list(dict.fromkeys(row.shares[name].n for row in having)),
            "rows": [(row, row.shares[name]) for row in having],
            "unparsed": {
                row.name: row.verdicts[name]["unparsed"] for row in having if row.verdicts[name].get("unparsed")
            },
            "truncated": {row.name: row.truncated[name] for row in having if row.truncated[name]},
        }


def _differences(rows: Sequence[Row], found: Sequence[Paired]) -> Iterator[dict[str, Any]]:
    """Tables of pairs of models: a column for each score; of a sweep a table a score, a column for each condition."""
    by_name = {row.name: row for row in rows}
    sweep = any(row.condition is not None for row in rows)
    places = {each: (by_name[each.first].condition, each.score) for each in found}
    for title in dict.fromkeys(each.score for each in found) if sweep else [""] * bool(found):
        chosen = [each for each in found if title in ("", each.score)]
        columns = list(dict.fromkeys(places[each] for each in chosen))
        lines: dict[tuple[str, str], list[Paired | None]] = {}
        for each in chosen:
            pair = (by_name[each.second].model, by_name[each.first].model)
            lines.setdefault(pair, [None] * len(columns))[columns.index(places[each])] = each
        yield {
            "title": title,
            "columns": [condition or score for condition, score in columns],
            "lines": lines,
        }


def _points(difference: float) -> str:
    """A difference of shares in percentage points."""
    return f"{100 * difference:+.1f}".replace("-", "−") if abs(difference) >= 5e-4 else "0.0"


def _categories(rows: Sequence[Row]) -> Iterator[dict[str, Any]]:
    """The scores that have categories: of each category a share for each model, None where it has none."""
    for name in dict.fromkeys(name for row in rows for name in row.categories):
        having = [row for row in rows if name in row.categories]
        labels = dict.fromkeys(label for row in having for label in row.categories[name])
        lines: dict[str, list[Share | None]] = {
            label: [row.categories[name].get(label) for row in having] for label in labels
        }
        yield {"name": name, "rows": having, "lines": lines, "good": name.split()[-1] == "accuracy"}


def _harness(rows: Sequence[Row]) -> dict[tuple[str, str], list[str]]:
    """What lm-evaluation-harness reported, by task and metric: a text for each model, of several seeds the first."""
    found: dict[tuple[str, str], list[str]] = {}
    for i, row in enumerate(rows):
        for task, metrics in read_json(row.folders["assess"][0] / "results.json").get("lm_eval", {}).items():
            for key, value in metrics.items():
                metric, comma, variant = key.partition(",")
                if comma and isinstance(value, float) and not metric.endswith("_stderr"):
                    error = metrics.get(f"{metric}_stderr,{variant}")
                    spread = f" ± {Z_95 * error:.3f}" if isinstance(error, float) else ""
                    name = metric if variant == "none" else f"{metric} ({variant})"
                    found.setdefault((task, name), [MISSING] * len(rows))[i] = f"{value:.3f}{spread}"
    return found


def _sweep(rows: Sequence[Row], drawn: Mapping[str, Style]) -> list[tuple[str, str]]:
    """The title of each panel, and the picture."""
    return [(each.title, svg(each.figure(), f"sweep{i}")) for i, each in enumerate(panels(rows, drawn))]


def _maps(rows: Sequence[Row]) -> dict[str, Any] | None:
    """A small heat map for each measured model, of several seeds the first, all in the same colours."""
    measured = [(row, read_json(row.folders["sinks"][0] / "sinks.json")) for row in rows if "sinks" in row.folders]
    found = [(row, np.array(each["divergence"], np.float64)) for row, each in measured if "divergence" in each]
    if not found:
        return None
    end = max(limit(divergence) for _, divergence in found)
    images = [(row, *divergence.shape, base64_text(thumbnail(divergence, end))) for row, divergence in found]
    layers = max(divergence.shape[0] for _, divergence in found)
    dot = 8 if layers > 16 else 14
    return {"limit": end, "images": images, "dot": dot, "width": layers * dot}


def _curves(rows: Sequence[Row], drawn: Mapping[str, Style]) -> Iterator[dict[str, Any]]:
    """The pictures of each metric, in a sweep one for each condition."""
    for number, condition in enumerate(dict.fromkeys(row.condition for row in rows)):
        for metric, found in curves([row for row in rows if row.condition == condition]).items():
            label = metric.removeprefix("eval_").replace("_", " ")
            names = list(dict.fromkeys(name for each in found for name in (each.model, *each.matched)))
            salt = f"curve{number}{metric}".replace(".", "_")
            yield {
                "condition": condition,
                "metric": metric,
                "names": names,
                "svg": svg(figure_of(found, label, drawn), salt),
            }
