"""Run a door as a user types it."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def run(*words: str | Path) -> subprocess.CompletedProcess[str]:
    """`python words` at the root of the repository."""
    command = [sys.executable, *map(str, words)]
    return subprocess.run(command, cwd=ROOT, text=True, capture_output=True, timeout=300, check=False)
