"""What a rewriting leaves: report.json, report.html and the lines for a terminal. Numbers only, no text."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pipeline.curation.dgr_filters import FILTERS
from pipeline.curation.dgr_request import Strength
from pipeline.curation.dgr_rounds import Outcome
from pipeline.curation.dgr_stages import Lines
from pipeline.report.files import write_bytes
from pipeline.report.html import render
from pipeline.report.intervals import Z_95, wilson
from pipeline.training.manifest import write_json

METRICS = {
    "nll": "NLL a token, nats",
    "nll_thought": "NLL, thought",
    "nll_answer": "NLL, reply",
    "nll_first": "NLL, first 32 tokens",
    "unlikely": "share of tokens with probability below 0.01",
    "rank": "mean rank of the token",
    "tokens": "tokens a row",
}
REPORT = "report.json"


def numbers(
    outcomes: Sequence[Outcome],
    *,
    fallback: str,
    rounds: Sequence[str],
    probe: Mapping[Strength, float] | None,
    own: Lines,
) -> dict[str, Any]:
    """The report without the settings.

    Means are over rows, each weighing the same. `before` is the source as it was, `after` what the output holds: with
    --fallback original a mixture, whose share of originals is the fallback rate.
    """
    failed = [each for each in outcomes if each.turn is None]
    kept = [each for each in outcomes if each.turn is not None or fallback == "original"]
    refined = [each for each in outcomes if each.turn is not None]
    pairs = [(each.before, each.after or each.before) for each in kept]
    beside = {each.source.id: (each.before, each.after or each.before) for each in kept if each.source.id in own}
    return {
        "rows": len(outcomes),
        "refined": len(refined),
        "fallback": len(failed) if fallback == "original" else 0,
        "dropped": len(failed) if fallback == "drop" else 0,
        "fallback_rate": _share(len(failed), len(outcomes)),
        "candidates": sum(each.tries for each in outcomes),
        "filters": {name: sum(each.reasons[name] for each in outcomes) for name in FILTERS},
        "rounds": _rounds(outcomes, rounds),
        "probe": probe,
        "categories": _categories(outcomes),
        "shift": {
            "before": _means([each.before for each in outcomes]),
            "after": _means([after for _, after in pairs]),
            "refined_before": _means([each.before for each in refined]),
            "refined_after": _means([each.after or {} for each in refined]),
        },
        "nll_change": _change([after["nll"] - before["nll"] for before, after in pairs]),
        "beside_own": {
            "own": _means([own[name] for name in beside]),
            "before": _means([before for before, _ in beside.values()]),
            "after": _means([after for _, after in beside.values()]),
            "rows": len(beside),
        },
    }


def write_report(found: dict[str, Any], folder: Path) -> None:
    """report.html, then report.json: where that is, the rewriting is finished."""
    page = render("rewrite_page.html", {}, found=found, metrics=METRICS, conditions=FILTERS)
    write_bytes(folder / "report.html", page.encode())
    write_json(folder / REPORT, found)


def summary(found: Mapping[str, Any], folder: Path) -> str:
    """The outcome for a terminal."""
    rate, kept = found["fallback_rate"], found["fallback"] or found["dropped"]
    lines = [
        f"rewritten      {found['refined']} of {found['rows']} rows, from {found['candidates']} candidates",
        f"fallback rate  {rate['value']:.1%} ({rate['low']:.1%} to {rate['high']:.1%}): {kept} rows "
        + ("left out" if found["dropped"] else "keep their original"),
    ]
    before, after = found["shift"]["before"], found["shift"]["after"]
    if after:
        change = found["nll_change"]
        lines.append(
            f"shift          NLL {before['nll']:.3f} -> {after['nll']:.3f} nats a token (paired "
            f"{change['mean']:+.3f}, {change['low']:+.3f} to {change['high']:+.3f}), unlikely tokens "
            f"{before['unlikely']:.1%} -> {after['unlikely']:.1%}, "
            f"tokens {before['tokens']:.0f} -> {after['tokens']:.0f}"
        )
    if found["settings"]["guard"] is None:
        lines.append(
            "warning        --guard none: no model looked at what was written; read it before you train on it"
        )
    return "\n".join([*lines, f"{folder / 'refined.jsonl'}: for --train_data; {folder / 'report.html'}: the report"])


def _share(k: int, n: int) -> dict[str, Any]:
    low, high = wilson(k, n)
    return {"value": k / n, "low": low, "high": high, "k": k, "n": n}


def _rounds(outcomes: Sequence[Outcome], strengths: Sequence[str]) -> list[dict[str, Any]]:
    found, left = [], len(outcomes)
    for number, strength in enumerate(strengths, 1):
        if left:
            refined = sum(each.round == number for each in outcomes)
            found.append({"round": number, "strength": strength, "rows": left, "refined": refined})
            left -= refined
    return found


def _categories(outcomes: Sequence[Outcome]) -> dict[str, Any]:
    names = dict.fromkeys(each.source.category for each in outcomes if each.source.category)
    having = {name: [each for each in outcomes if each.source.category == name] for name in names}
    return {name: _share(sum(each.turn is None for each in rows), len(rows)) for name, rows in having.items()}


def _means(lines: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """The mean of each metric over the rows that have it."""
    columns = {name: [line[name] for line in lines if name in line] for name in METRICS}
    return {name: statistics.fmean(values) for name, values in columns.items() if values}


def _change(differences: Sequence[float]) -> dict[str, float] | None:
    """Mean of paired differences with its 95 % interval, normal approximation; None without rows."""
    if not differences:
        return None
    mean = statistics.fmean(differences)
    spread = 0.0
    if len(differences) > 1:
        spread = Z_95 * statistics.stdev(differences) / math.sqrt(len(differences))
    return {"mean": mean, "low": mean - spread, "high": mean + spread, "n": len(differences)}
