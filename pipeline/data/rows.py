"""A row as it was stored, and one error for many bad ones."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

_SHOWN_PROBLEMS = 20


@dataclass(frozen=True)
class Row:
    """One row as stored. ``id`` is ``train.jsonl:12``: the file's name and the 1-based line (else row)."""

    id: str
    fields: dict[str, Any]


def bad_rows(problems: Sequence[str]) -> ValueError:
    """One error for many bad rows, one line each, cut after 20."""
    more = len(problems) - _SHOWN_PROBLEMS
    return ValueError("\n".join([*problems[:_SHOWN_PROBLEMS], *([f"and {more} more"] if more > 0 else [])]))
