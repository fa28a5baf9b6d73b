"""Converts CHECKPOINT to OUT in processes that are killed, five times at random points, and then to its end.

Prints JSON: for each kill the files that were finished then, with the time they were written, and what a second
conversion into the same OUT was told just before. Forks, so that the imports are paid once.
"""

from __future__ import annotations

import json
import os
import random
import signal
import sys
import time
from pathlib import Path

import torch

from pipeline.checkpoints.convert import convert

KILLS, SIZE = 5, "2MB"


def finished(partial: Path) -> dict[str, int]:
    return {path.name: path.stat().st_mtime_ns for path in partial.glob("*.safetensors")}


def kill_one(checkpoint: Path, out: Path, wait: float) -> dict[str, object]:
    """Start a conversion, and kill it `wait` seconds after it has begun to write."""
    partial = out.with_name(f".{out.name}.partial")
    before = finished(partial)
    child = os.fork()
    if child == 0:
        run(checkpoint, out)
        os._exit(0)
    while len(finished(partial)) <= len(before) and not os.waitid(
        os.P_PID, child, os.WEXITED | os.WNOHANG | os.WNOWAIT
    ):
        time.sleep(0.001)
    os.kill(child, signal.SIGSTOP)
    told = ""
    try:
        run(checkpoint, out)
    except ValueError as error:
        told = str(error)
    os.kill(child, signal.SIGCONT)
    time.sleep(wait)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return {"finished": finished(partial), "told": told, "there": out.exists()}


def run(checkpoint: Path, out: Path) -> None:
    convert(checkpoint, out, dtype=torch.bfloat16, allow_attacked=False, max_shard_size=SIZE, workers=1)


def main() -> None:
    checkpoint, out = Path(sys.argv[1]), Path(sys.argv[2])
    waits = random.Random(time.time_ns())
    kills = [kill_one(checkpoint, out, waits.uniform(0, 0.05)) for _ in range(KILLS)]
    run(checkpoint, out)
    print(json.dumps(kills))


if __name__ == "__main__":
    main()
