"""The comparison as a Markdown table with its footnotes, and as JSON with every seed."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from pipeline.report.comparison import Mean, Row, Share
from pipeline.report.files import write_bytes
from pipeline.report.paired import compare

MISSING = "–"


def write_table(rows: Sequence[Row], output_dir: Path) -> str:
    """Writes table.md and table.json, the latter last and with the tests of all pairs, and returns the Markdown: every
    column, of a sweep each share over the conditions."""
    notes, swept = footnotes(rows), share_tables(rows)
    if swept:
        others = [row for row in rows if row.condition is None]
        tables = [*map(aligned, swept), *([markdown(others)] if others else [])]
        shown = [*explanations(rows), "Losses, times, and which checkpoint each control is: report.md, table.json."]
    else:
        tables, shown = [markdown(rows)], notes
    text = "\n".join([*(line for table in tables for line in [*table, ""]), *(f"- {note}" for note in shown), ""])
    output_dir.mkdir(parents=True, exist_ok=True)
    found, unpaired = compare(rows)
    differences = {"differences": [asdict(each) for each in found], "unpaired": unpaired}
    content = json.dumps({"rows": [row.record() for row in rows], "notes": notes, **differences}, indent=1) + "\n"
    for name, written in (("table.md", text), ("table.json", content)):
        write_bytes(output_dir / name, written.encode())
    return text


def cells(rows: Sequence[Row]) -> list[list[str]]:
    """The header and a line a model: a column for each share and loss that any model has, heads and time."""
    shares = list(dict.fromkeys(name for row in rows for name in row.shares))
    losses = list(dict.fromkeys(name for row in rows for name in row.losses))
    header = ["model", *(name.replace("_", " ") for name in shares), *(f"CE {name}" for name in losses)]
    lines = [[*header, "positive heads", "s/step"]]
    for row in rows:
        line = [row.name]
        line += [share_text(row.shares[name]) if name in row.shares else MISSING for name in shares]
        line += [_mean(row.losses.get(name), "{:.3f}") for name in losses]
        line += [_mean(row.positive_heads, "{:.1%}"), _mean(row.seconds_per_step, "{:.2f}")]
        lines.append(line)
    return lines


def share_tables(rows: Sequence[Row]) -> list[list[list[str]]]:
    """Of a sweep over two conditions or more, a table for each share: a header, then a line a model with a column a
    condition."""
    conditions = list(dict.fromkeys(row.condition for row in rows if row.condition is not None))
    if len(conditions) < 2:
        return []
    found = {(row.model, row.condition): row.shares for row in rows if row.condition is not None}
    models = dict.fromkeys(model for model, _ in found)
    tables = []
    for name in dict.fromkeys(name for shares in found.values() for name in shares):
        lines = [[name.replace("_", " "), *conditions]]
        for model in models:
            shares = [found.get((model, condition), {}).get(name) for condition in conditions]
            lines.append([model, *(MISSING if share is None else share_text(share) for share in shares)])
        tables.append(lines)
    return tables


def markdown(rows: Sequence[Row]) -> list[str]:
    """The table's lines."""
    return aligned(cells(rows))


def aligned(lines: Sequence[Sequence[str]]) -> list[str]:
    """A Markdown table of a header and rows; a bar in a cell is escaped."""
    texts = [[cell.replace("|", "\\|") for cell in line] for line in lines]
    widths = [max(len(line[i]) for line in texts) for i in range(len(texts[0]))]
    texts.insert(1, ["-" * width for width in widths])
    return ["| " + " | ".join(map(str.ljust, line, widths)) + " |" for line in texts]


def footnotes(rows: Sequence[Row]) -> list[str]:
    """What the numbers are, and how well each control was matched."""
    notes = [
        *explanations(rows),
        "CE: cross-entropy per trained token (nats). s/step: median of the logged training steps.",
    ]
    return notes + [f"{row.name}: {match.sentence()}." for row in rows for match in row.matches]


def explanations(rows: Sequence[Row]) -> list[str]:
    """What the shares are."""
    shares = [each for row in rows for each in row.shares.items()]
    counts = dict.fromkeys(f"{name.replace('_', ' ')} n={share.n}" for name, share in shares)
    seeds = max(len(row.folders["assess"]) for row in rows)
    notes = [f"In brackets: 95 % Wilson intervals over held-out requests ({', '.join(counts)})."]
    if seeds > 1:
        notes.append(
            f"{seeds} seeds: shares are pooled, other numbers are means; in braces the lowest and the highest seed. "
            "Every seed is asked the same requests, so an interval does not cover what differs between seeds."
        )
    return notes


def share_text(share: Share) -> str:
    """Value, interval and, over several seeds, their range."""
    text = f"{share.value:.1%} [{share.low:.1%}, {share.high:.1%}]"
    return text + _spread([k / n for k, n in share.seeds], "{:.1%}")


def _mean(mean: Mean | None, form: str) -> str:
    return MISSING if mean is None else form.format(mean.value) + _spread(mean.seeds, form)


def _spread(seeds: Sequence[float], form: str) -> str:
    return f" {{{form.format(min(seeds))}, {form.format(max(seeds))}}}" if len(seeds) > 1 else ""
