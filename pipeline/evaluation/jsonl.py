"""JSONL files that a killed run can go on with: whole lines are kept, a torn last line is dropped."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from pipeline.report.records import parse_lines

REMEDY = "; remove the file and run again"
PRIVATE = 0o600
"""Mode of files that may hold text a model generated."""


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The objects of a finished file.

    Raises:
        ValueError: a line is no JSON object, by file and line.
    """
    return parse_lines(path, path.read_bytes(), remedy=REMEDY)


def resume_lines(path: Path) -> list[dict[str, Any]]:
    """The objects written so far, none if there is no file; a last line torn by a kill is cut off the file.

    Raises:
        ValueError: a line before the last is no JSON object, by file and line.
    """
    if not path.exists():
        return []
    content = path.read_bytes()
    whole = content[: content.rfind(b"\n") + 1]
    if len(whole) < len(content):
        os.truncate(path, len(whole))
    return parse_lines(path, whole, remedy=REMEDY)


def append_lines(path: Path, lines: Iterable[Mapping[str, Any]]) -> None:
    """Appends to a private file; what was appended survives a kill of this process."""
    with open(path, "a", encoding="utf-8", opener=_private) as file:
        file.writelines(_line(line) for line in lines)


def write_lines(path: Path, lines: Iterable[Mapping[str, Any]]) -> None:
    """Writes a whole private file: all of it or nothing."""
    partial = path.with_name(f"{path.name}.partial")
    partial.unlink(missing_ok=True)
    append_lines(partial, lines)
    partial.rename(path)


def _private(path: str, flags: int) -> int:
    return os.open(path, flags, PRIVATE)


def _line(fields: Mapping[str, Any]) -> str:
    return json.dumps(fields, ensure_ascii=False) + "\n"
