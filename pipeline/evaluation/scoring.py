"""Phase 3: the shares that a suite's verdicts add up to."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pipeline.evaluation.jsonl import read_lines
from pipeline.evaluation.judges import UNPARSED
from pipeline.evaluation.suite import Score
from pipeline.report.intervals import wilson


def scores(wanted: Sequence[Score], verdicts: Path) -> dict[str, dict[str, Any]]:
    """Each score as a share in 0..1 with its 95 % Wilson interval, and all verdicts behind it.

    Verdicts that could not be parsed are in no share, neither above nor below the line: `unparsed` counts them, as
    `truncated` counts answers that were cut, `injected` those that held marks of the judge's prompt, and `cut` those
    of which the judge read only the beginning. `by` has the share of each category.

    Raises:
        ValueError: not one verdict of a score's kind could be parsed.
    """
    lines = read_lines(verdicts)
    found = {}
    for score in wanted:
        mine = [line for line in lines if line["kind"] == score.kind]
        if not mine:
            continue
        share = _share(score, mine)
        if not share["n"]:
            raise ValueError(
                f"{verdicts}: none of its {len(mine)} verdicts could be parsed; is it the right judge and template?"
            )
        categories = sorted({line["category"] for line in mine if "category" in line})
        by = {each: _share(score, [line for line in mine if line.get("category") == each]) for each in categories}
        found[score.name] = share | {
            "kind": score.kind,
            "hits": list(score.hits),
            "verdicts": dict(sorted(Counter(line["verdict"] for line in mine).items())),
            "unparsed": sum(line["verdict"] == UNPARSED for line in mine),
            "truncated": sum(line["truncated"] for line in mine),
            "injected": sum("injected" in line for line in mine),
            "cut": sum("cut" in line for line in mine),
        }
        if categories:
            found[score.name]["by"] = {name: each for name, each in by.items() if each["n"]}
    return found


def _share(score: Score, lines: Sequence[dict[str, Any]]) -> dict[str, Any]:
    parsed = [line["verdict"] for line in lines if line["verdict"] != UNPARSED]
    k, n = sum(verdict in score.hits for verdict in parsed), len(parsed)
    low, high = wilson(k, n) if n else (0.0, 1.0)
    return {"value": k / n if n else None, "low": low, "high": high, "k": k, "n": n}
