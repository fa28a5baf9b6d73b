"""Stands in for `python` in a job's tasks, and makes one rank of pipeline/train.py do wrong in the middle of training.

FAULT is `skip:RANK:STEP` (that rank leaves out a forward and backward pass) or `sleep:RANK:STEP` (it stands still).
"""

from __future__ import annotations

import os
import runpy
import sys
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]


def inject(kind: str, rank: int, step: int) -> None:
    """Change what a method does in one step of one rank, in the first start of the job alone."""
    from pipeline.methods.surgery import Surgery

    right = Surgery.step

    def wrong(method: Any, ctx: Any) -> None:
        if ctx.step != step or os.environ["RANK"] != str(rank) or os.environ.get("SLURM_RESTART_COUNT", "0") != "0":
            right(method, ctx)
        elif kind == "sleep":
            time.sleep(3600)

    Surgery.step = wrong  # type: ignore[method-assign]


def main() -> None:
    """Run the script that was asked for."""
    del sys.argv[0]
    if sys.argv[0] == "pipeline/train.py":
        sys.path.insert(0, str(ROOT))
        kind, rank, step = os.environ["FAULT"].split(":")
        inject(kind, int(rank), int(step))
    runpy.run_path(sys.argv[0], run_name="__main__")


if __name__ == "__main__":
    main()
