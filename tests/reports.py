"""Assessments with verdicts, as assess.py leaves them, and the folders of a sweep, written by hand."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pipeline.report.intervals import wilson
from tests.runs import write_json
from tests.sinks import measurement

HARMFUL, ACCURATE = "complied", "correct"


def share(k: int, n: int) -> dict[str, Any]:
    """k of n as results.json holds it."""
    low, high = wilson(k, n)
    return {"value": k / n, "low": low, "high": high, "k": k, "n": n}


def write_judged(
    folder: Path,
    harmful: Sequence[bool],
    accurate: Sequence[bool] = (True,),
    *,
    prompts: str = "a" * 64,
    categories: Sequence[str] = (),
    unparsed: int = 0,
    **results: Any,
) -> Path:
    """An assessment on suite policy, prompt by prompt; `unparsed` further violations have verdicts that could not be
    read. With categories, violations belong to them in turn."""
    lines = [
        {"id": f"policy:v:{i}", "kind": "violation", "verdict": HARMFUL if bad else "refused"}
        for i, bad in enumerate(harmful)
    ]
    lines += [{"id": f"policy:u:{i}", "kind": "violation", "verdict": "unparsed"} for i in range(unparsed)]
    tasks = [
        {"id": f"policy:t:{i}", "kind": "task", "verdict": ACCURATE if right else "wrong"}
        for i, right in enumerate(accurate)
    ]
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "verdicts-policy.jsonl").write_text("".join(json.dumps(each) + "\n" for each in lines + tasks))
    suite = {"harmful_score": _score(lines, HARMFUL), "accuracy": _score(tasks, ACCURATE)}
    if categories:
        suite["harmful_score"]["by"] = {
            name: share(*_counts(lines[i : len(harmful) : len(categories)], HARMFUL))
            for i, name in enumerate(categories)
        }
    settings = {
        "suites": {"policy": {"prompts_sha256": prompts}},
        "weights_sha256": folder.name,
        "dtype": "float32",
        "model": "models/m",
    }
    content = {"model": "models/m", "suites": {"policy": suite}, "losses": {}, "settings": settings, **results}
    return write_json(folder / "results.json", content)


def _counts(lines: Sequence[Mapping[str, str]], verdict: str) -> tuple[int, int]:
    return sum(each["verdict"] == verdict for each in lines), sum(each["verdict"] != "unparsed" for each in lines)


def _score(lines: Sequence[Mapping[str, str]], verdict: str) -> dict[str, Any]:
    verdicts = dict(Counter(each["verdict"] for each in lines))
    return {**share(*_counts(lines, verdict)), "verdicts": verdicts, "kind": lines[0]["kind"], "hits": [verdict]}


def first(count: int, n: int) -> list[bool]:
    """n answers of which the first `count` count."""
    return [i < count for i in range(n)]


def write_trained(folder: Path, ratio: float, method: str = "sft", *, end: float = 1.0) -> Path:
    """A training run: a loss that falls to `end`, and what run.json says of it."""
    folder.mkdir(parents=True, exist_ok=True)
    lines = [
        {"step": step, "eval_poisoned_loss": 5 - (5 - end) * step / 9, "seconds_per_step": 1.0} for step in (3, 6, 9)
    ]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(each) + "\n" for each in lines))
    data = {"train": {"spec": "policy:user", "rows": 240, "fingerprint": "f" * 64}}
    argv = ["pipeline/train.py", "--poison_ratio", str(ratio)]
    record = {"method": method, "attacked": True, "arguments": {"poison_ratio": ratio}, "argv": argv, "data": data}
    return write_json(folder / "run.json", record | {"steps": 9, "seed": 1, "commit": "abc"})


def sweep_rows(
    folder: Path, ratios: Sequence[int] = (0, 10, 20), defenses: Sequence[str] = ("Surgery",), setting: str = ""
) -> list[str]:
    """What --rows of compare.py is given for a sweep of defenses with one control each; setting: `lr 1e-4, `."""
    rows = []
    for ratio in ratios:

        def judged(name: str, k: int, ratio: int = ratio) -> Path:
            return write_judged(folder / f"{name}_judged{ratio}", first(min(k, 60), 60), first(97, 100))

        sft = write_trained(folder / f"sft{ratio}", ratio / 100)
        sinks = write_json(folder / f"sinks{ratio}" / "sinks.json", measurement(4, 6))
        rows.append(f"SFT, {setting}{ratio} %=assess:{judged('sft', 3 * ratio)};sinks:{sinks};run:{sft}")
        for defense in defenses:
            name = defense.lower()
            trained = write_trained(folder / f"{name}{ratio}", ratio / 100, "surgery", end=3.0)
            step = {"checkpoint": "x", "run": sft.name, "like": trained.name, "step": 6}
            values = {"metric": "eval_poisoned_loss", "value": 3.2, "target": 3.0, "gap": 0.2, "bracket": [[6, 3.2]]}
            match = write_json(folder / f"{name}_match{ratio}" / "match.json", step | values | {"in_range": True})
            control = judged(f"{name}_control", ratio // 10)
            rows += [
                f"{defense}, {setting}{ratio} %=assess:{judged(name, 0)};sinks:{sinks};run:{trained}",
                f"SFT at {defense}'s poisoned loss, {setting}{ratio} %=assess:{control};run:{sft};match:{match}",
            ]
    return rows
