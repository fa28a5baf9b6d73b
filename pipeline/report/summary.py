"""The report in text: the table, what differs significantly and what does not, and how it was measured."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from pipeline.report.comparison import Row
from pipeline.report.controls import beyond_slower_learning
from pipeline.report.paired import Paired
from pipeline.report.provenance import provenance
from pipeline.report.table import MISSING, aligned, footnotes, markdown, share_tables, share_text


def markdown_report(
    rows: Sequence[Row], found: Sequence[Paired], unpaired: Sequence[str], gate: Sequence[Mapping[str, Any]]
) -> str:
    """Markdown; `found` and `unpaired` are paired.compare's, `gate` the entries of results.json with their `model`."""
    lines = ["# Evaluation report", ""]
    for table in share_tables(rows):
        lines += [*aligned(table), ""]
    lines += [*markdown(rows), "", *(f"- {note}" for note in footnotes(rows))]
    if controls := beyond_slower_learning(rows, found):
        lines += ["", "## Beyond slower learning", "", *(f"- {each}." for each in controls)]
    if gate:
        lines += ["", "## Release gate", "", *(f"- {each['model']}: {each['sentence']}" for each in gate)]
    if found or unpaired:
        lines += ["", "## Differences between models", "", *differences(found, unpaired)]
    lines += list(_categories(rows))
    return "\n".join([*lines, *_how(rows), ""])


def differences(found: Sequence[Paired], unpaired: Sequence[str]) -> Iterator[str]:
    """What is significant, then what is not, as list entries."""
    if found:
        yield "Exact McNemar test on the same prompts, Holm's correction over the pairs of each score."
        yield ""
    for wanted in (True, False):
        yield from (f"- {each.sentence()}." for each in found if each.significant is wanted)
    yield from (f"- {each}." for each in unpaired)


def _categories(rows: Sequence[Row]) -> Iterator[str]:
    for name in dict.fromkeys(name for row in rows for name in row.categories):
        having = [row for row in rows if name in row.categories]
        labels = dict.fromkeys(label for row in having for label in row.categories[name])
        lines = [["category", *(row.name for row in having)]]
        for label in labels:
            shares = [row.categories[name].get(label) for row in having]
            lines.append([label, *(MISSING if share is None else share_text(share) for share in shares)])
        yield from ("", f"## {name.replace('_', ' ').capitalize()} by category", "", *aligned(lines))


def _how(rows: Sequence[Row]) -> Iterator[str]:
    shared, models = provenance(rows)
    yield from ("", "## How it was measured", "")
    yield from (f"- {key}: `{value}`" for key, value in shared.items())
    for model in models:
        yield from ("", f"### {model.name}", "")
        yield from (f"- {key}: {value}" for key, value in model.facts)
        for command in model.commands:
            yield from ("", "```bash", command, "```")
