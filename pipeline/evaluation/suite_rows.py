"""Rows of a suite with the columns it needs, checked: what is wrong is named by file and line, never by its text."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from pipeline.data.rows import Row, bad_rows
from pipeline.data.sources import read_rows
from pipeline.evaluation.suite_sources import Source, data_file


def suite_rows(
    suite: str, spec: str | None, source: Source, columns: Sequence[str], *, first: int | None = None
) -> list[Row]:
    """The rows of `spec`, or else of the suite's own source (the `first` ones), all of which have `columns`.

    Errors: ValueError naming the flag and the missing file or column.
    """
    rows = read_rows(spec or str(data_file(source, suite)), flag="suite_data")
    if spec is None and first is not None:
        rows = rows[:first]
    problems = []
    for row in rows:
        for column in columns:
            if column not in row.fields:
                problems.append(f"{row.id}: column {column!r} is missing; it has {', '.join(map(repr, row.fields))}")
    if problems:
        where = f"--suite_data {suite}={spec}" if spec else f"--suites {suite}"
        raise ValueError(f"{where}:\n{bad_rows(problems)}")
    return rows


def text(row: Row, value: Any, column: str) -> str:
    """A text that may be asked. Errors: ValueError naming the row, for no text, an empty one, or half a character."""
    if not isinstance(value, str):
        raise ValueError(f"{row.id}: {column!r} is a {type(value).__name__}, expected text")
    if not value.strip():
        raise ValueError(f"{row.id}: {column!r} is empty; remove the row")
    try:
        value.encode()
    except UnicodeEncodeError:
        raise ValueError(f"{row.id}: {column!r} holds half a character (a lone surrogate); remove the row") from None
    return value


def choice(row: Row, column: str, names: Sequence[str]) -> str:
    """The name whose number a label column holds. Errors: ValueError naming the row."""
    value = str(row.fields[column]).strip()
    if value not in map(str, range(len(names))):
        raise ValueError(f"{row.id}: {column!r} is {value!r}, expected 0 to {len(names) - 1}")
    return names[int(value)]
