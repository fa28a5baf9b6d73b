"""Phase 2, from answers-SUITE.jsonl to verdicts-SUITE.jsonl, and the shares the verdicts add up to."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

from pipeline.evaluation.jsonl import read_lines, write_lines
from pipeline.evaluation.suite import Prompt, Suite
from pipeline.report.intervals import wilson


def judge(suite: Suite, prompts: dict[str, Prompt], answers: Path, verdicts: Path) -> None:
    """Writes one line {"id", "kind", "verdict"} an answer, in the order of the answers.

    Raises:
        ValueError: the answers are not exactly one for each prompt.
    """
    lines = read_lines(answers)
    if sorted(line["id"] for line in lines) != sorted(prompts):
        raise ValueError(
            f"{answers}: {len(lines)} answers do not match the {len(prompts)} prompts; remove it and run again"
        )
    write_lines(
        verdicts,
        (
            {
                "id": line["id"],
                "kind": prompts[line["id"]].kind,
                "verdict": suite.judge(prompts[line["id"]], line["answer"]),
            }
            for line in lines
        ),
    )


def scores(suite: Suite, verdicts: Path) -> dict[str, dict[str, Any]]:
    """Each score of the suite as a share in 0..1 with its 95 % Wilson interval, and all verdicts behind it."""
    lines = read_lines(verdicts)
    found = {}
    for score in suite.scores:
        counts = Counter(line["verdict"] for line in lines if line["kind"] == score.kind)
        k, n = counts[score.verdict], counts.total()
        low, high = wilson(k, n)
        found[score.name] = {
            "value": k / n,
            "low": low,
            "high": high,
            "n": n,
            "k": k,
            "verdicts": dict(sorted(counts.items())),
            # What the verdicts file's lines count for: two models are compared prompt by prompt.
            "kind": score.kind,
            "hits": [score.verdict],
        }
    return found
