"""The report phase: needs the output folder alone. From verdicts to results.json, and to lines for a terminal."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pipeline.evaluation.gate import Condition
from pipeline.evaluation.jsonl import read_lines
from pipeline.evaluation.lm_eval_tasks import FILE
from pipeline.evaluation.record import Record
from pipeline.evaluation.scoring import scores
from pipeline.evaluation.suites import SUITES
from pipeline.report.comparison import read_row
from pipeline.report.model_card import write_model_card
from pipeline.report.page import write_report
from pipeline.report.records import read_json
from pipeline.training.manifest import write_json


def report(folder: Path, suites: Sequence[str], conditions: Sequence[Condition]) -> dict[str, Any]:
    """Writes results.json and returns it: the scores of `suites`, the cross-entropies, other tasks, the settings, and
    what became of the gate's conditions. From it the report's page and the model card are made.

    Raises:
        ValueError: a suite has no verdicts yet.
    """
    settings = Record(folder).read()
    found = {}
    for name in suites:
        verdicts = folder / f"verdicts-{name}.jsonl"
        if not verdicts.is_file():
            raise ValueError(f"{verdicts}: no such file; run `python pipeline/assess.py judge` first")
        found[name] = scores(SUITES[name].scores, verdicts)
    losses = folder / "losses.jsonl"
    lines = read_lines(losses) if losses.is_file() else []
    results = {
        "model": settings["model"],
        "suites": found,
        "losses": {line["name"]: {key: line[key] for key in line if key != "name"} for line in lines},
        "settings": settings,
        "gate": [each.verdict(found) for each in conditions],
    }
    if (folder / FILE).is_file():
        results["lm_eval"] = read_json(folder / FILE)
    write_json(folder / "results.json", results)
    write_report([read_row(Path(results["model"]).name, {"assess": [folder]})], folder)
    write_model_card(folder)
    return results


def summary(results: dict[str, Any]) -> str:
    """The scores for a terminal: numbers only, never an answer."""
    lines = []
    for suite, shares in results["suites"].items():
        settings = results["settings"]["suites"][suite]
        for name, score in shares.items():
            share, interval = f"{score['value']:.1%}", f"{score['low']:.1%} to {score['high']:.1%}"
            lines.append(f"{suite:<12} {name:<16} {share:>7}  ({interval}, {score['k']} of {score['n']})")
            notes = {
                "unparsed verdicts": score["unparsed"],
                "answers cut at --max_new_tokens": score["truncated"] if score["kind"] != "task" else 0,
                "answers with marks of the judge's prompt, neutralised": score["injected"],
            }
            lines += [f"{'':<12} {count} {note}" for note, count in notes.items() if count]
        lines += [f"{'':<12} left out: {count} {reason}" for reason, count in settings["left_out"].items()]
        judge = settings["judge"]
        licences = [settings["licence"], *([judge["licence"]] if "licence" in judge else [])]
        if any("non-commercial" in each for each in licences):
            lines.append(
                f"{'':<12} licences: data {licences[0]}" + "".join(f", judge {each}" for each in licences[1:])
            )
    for name, loss in results["losses"].items():
        lines.append(f"{'loss':<12} {name:<16} {loss['value']:>7.4f}  ({loss['tokens']} tokens)")
    for task, metrics in results.get("lm_eval", {}).items():
        for name, value in metrics.items():
            if "," in name and "_stderr" not in name:
                lines.append(f"{'lm_eval':<12} {task:<16} {value:>7.4f}  ({name})")
    lines += [f"gate failed: {each['sentence']}" for each in results["gate"] if each["failed"]]
    return "\n".join(lines)
