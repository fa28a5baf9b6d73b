"""Reading what the stages wrote, JSON results and the metrics of a training run; errors name file and line."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file. Errors: ValueError if it is missing or not a JSON object."""
    if not path.is_file():
        raise ValueError(f"{path}: no such file")
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path}: not valid JSON: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path}: expected a JSON object")
    return content


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The objects of a JSONL file. Errors: ValueError naming file and line."""
    return parse_lines(path, path.read_bytes())


def parse_lines(path: Path, content: bytes, *, remedy: str = "") -> list[dict[str, Any]]:
    """The objects of a JSONL file's content. Errors: ValueError naming file and line, with the remedy behind it."""
    lines = []
    for number, text in enumerate(content.splitlines(), 1):
        try:
            line = json.loads(text)
        except UnicodeDecodeError as error:
            raise ValueError(f"{path}:{number}: not UTF-8 ({error}){remedy}") from error
        except ValueError as error:
            raise ValueError(f"{path}:{number}: not valid JSON ({error}){remedy}") from error
        if not isinstance(line, dict):
            raise ValueError(f"{path}:{number}: expected an object in braces{remedy}")
        lines.append(line)
    return lines


def read_metrics(run: Path) -> list[dict[str, Any]]:
    """The lines of a run's metrics.jsonl, each with a whole number `step`. Errors: ValueError naming file and line."""
    path = run / "metrics.jsonl"
    if not path.is_file():
        raise ValueError(f"{path}: no such file; {run} is not the folder of a training run")
    lines = read_lines(path)
    for number, line in enumerate(lines, 1):
        if not isinstance(line.get("step"), int):
            raise ValueError(f"{path}:{number}: expected an object with a whole number `step`")
    return lines


def series(run: Path, metric: str) -> dict[int, float]:
    """A metric of a run by step, ascending. Errors: ValueError if it was never logged, or is not finite."""
    lines = read_metrics(run)
    values = {line["step"]: float(line[metric]) for line in lines if metric in line}
    if not values:
        known = sorted({key for line in lines for key in line} - {"step"})
        raise ValueError(f"{run / 'metrics.jsonl'}: {metric} was never logged; it has {', '.join(known) or 'nothing'}")
    for step, value in values.items():
        if not math.isfinite(value):
            raise ValueError(f"{run / 'metrics.jsonl'}: {metric} is {value} at step {step}")
    return dict(sorted(values.items()))
