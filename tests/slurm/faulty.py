"""Stands in for `python` in a job's tasks, and makes a rank of pipeline/train.py do wrong, or all of them slow.

FAULTS has a word for each start of the job, none for those after: `skip:RANK:STEP` (that rank leaves out a forward and
backward pass), `sleep:RANK:STEP` (it stands still) or `slow:SECONDS` (every step of every rank takes so much longer,
so that a test has the time to disturb it).
"""

from __future__ import annotations

import os
import runpy
import sys
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]


def inject(kind: str, *numbers: str) -> None:
    """Change what Surgery does in a step."""
    from pipeline.methods.surgery import Surgery

    right = Surgery.step

    def wrong(method: Any, ctx: Any) -> None:
        if kind == "slow":
            time.sleep(float(numbers[0]))
        elif numbers == (os.environ["RANK"], str(ctx.step)):
            if kind == "sleep":
                time.sleep(3600)
            return
        right(method, ctx)

    Surgery.step = wrong  # type: ignore[method-assign]


def main() -> None:
    """Run the script that was asked for."""
    del sys.argv[0]
    faults, start = os.environ["FAULTS"].split(), int(os.environ.get("SLURM_RESTART_COUNT", "0"))
    if sys.argv[0] == "pipeline/train.py" and start < len(faults):
        sys.path.insert(0, str(ROOT))
        from pipeline.training import signals

        signals.listen()  # as train.py does first, for the imports of a fault take seconds too
        inject(*faults[start].split(":"))
    runpy.run_path(sys.argv[0], run_name="__main__")


if __name__ == "__main__":
    main()
