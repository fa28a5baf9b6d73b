"""A few cycles of the soak script; `python tests/distributed/soak.py` runs as many as asked."""

from __future__ import annotations

from pathlib import Path

from tests.distributed.lives import Lives
from tests.distributed.soak import soak


def test_kills_anywhere_lose_nothing(server: Lives, tmp_path: Path) -> None:
    summary = soak(server, tmp_path, cycles=6, steps=9, seed=3)
    assert summary["problems"] == []
    assert summary["runs_finished"] >= 1
