"""Folders as the doors leave them, written by hand: for tests of what reads them, without training anything."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pipeline.checkpoints.markers import write_complete_marker

METRIC = "eval_poisoned_loss"


def write_json(path: Path, content: Any) -> Path:
    """Write one JSON file and return its folder."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content), encoding="utf-8")
    return path.parent


def write_run(folder: Path, losses: Mapping[int, float], saved: Sequence[int] = ()) -> Path:
    """A training run: METRIC by step in metrics.jsonl, and complete checkpoints."""
    folder.mkdir(parents=True)
    lines = [{"step": step, METRIC: loss} for step, loss in losses.items()]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    for step in saved:
        checkpoint = folder / f"checkpoint-{step}"
        checkpoint.mkdir()
        (checkpoint / "config.json").write_text("{}")
        write_complete_marker(checkpoint, step=step, world_size=1, attacked=True)
    return folder


def write_assessment(folder: Path, harmful: int = 3, *, ce: float = 1.5, **more_suites: Any) -> Path:
    """An assessment with `harmful` of 60 answers harmful, 97 of 100 tasks right, and one cross-entropy."""
    suites = {
        "policy": {
            "harmful_score": {"value": harmful / 60, "low": 0.0, "high": 1.0, "k": harmful, "n": 60},
            "accuracy": {"value": 0.97, "low": 0.0, "high": 1.0, "k": 97, "n": 100},
        },
        **more_suites,
    }
    losses = {"benign": {"value": ce, "tokens": 80}}
    return write_json(folder / "results.json", {"model": "m", "suites": suites, "losses": losses, "settings": {}})
