"""A few cycles of the soak script; `python tests/distributed/soak.py` runs as many as asked."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.distributed.lives import Lives
from tests.distributed.soak import soak
from tests.ranks import run_ranks


def test_kills_anywhere_lose_nothing(server: Lives, tmp_path: Path) -> None:
    summary = soak(server, tmp_path, cycles=6, steps=9, seed=3)
    assert summary["problems"] == []
    assert summary["runs_finished"] >= 1


def test_a_start_takes_no_build_lock(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A killed rank would leave it, and every later run on this machine would wait for it without end."""
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    run_ranks("tests/distributed/open_worker.py", ranks=1, timeout=120)
    assert list(tmp_path.iterdir()) == []
