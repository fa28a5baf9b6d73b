"""Starting the probe and reading what it answered, also from one that crashed or hung."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

PROBE = Path(__file__).with_name("probe.py")
Answers = Mapping[str, Mapping[str, Any]]  # of each step; one that failed has "error"


def run_probe(imports: Sequence[str], devices: str | int | None, seconds: float) -> Answers:
    """Answers of `import NAME` for each module, and of `torch` and `device N` unless devices is None.

    After a crash the steps behind it are tried in a new process; after a hang they are not, and have no answer.
    """
    answers: dict[str, Mapping[str, Any]] = {}
    left = list(imports)
    while True:
        plan = json.dumps({"imports": left, "devices": devices})
        lines, ended, hung = run_steps([sys.executable, str(PROBE), plan], seconds)
        answers |= {line["step"]: line for line in lines if len(line) > 1}
        if ended is None:
            return answers
        at = lines[-1]["step"] if lines else "start"
        answers[at] = {"error": ended}
        left = [name for name in left if f"import {name}" not in answers]
        if hung or not at.startswith("import "):
            return answers


def run_steps(command: Sequence[str], seconds: float) -> tuple[list[dict[str, Any]], str | None, bool]:
    """Run a program that prints a JSON line a step: its lines, how it ended if not well, and whether it hung."""
    try:
        done = subprocess.run(command, capture_output=True, timeout=seconds, stdin=subprocess.DEVNULL)
        output, errors, code = done.stdout, done.stderr, done.returncode
    except subprocess.TimeoutExpired as stopped:
        return _lines(stopped.stdout or b""), f"did not end within {seconds:g} s", True
    if code == 0:
        return _lines(output), None, False
    last = errors.decode(errors="replace").strip().rpartition("\n")[2][:300]
    how = f"python was killed by {signal.Signals(-code).name}" if code < 0 else f"python exited with {code}"
    return _lines(output), f"{how}: {last}" if last else how, False


def _lines(output: bytes) -> list[dict[str, Any]]:
    """The whole lines of an output that may have been cut."""
    return [json.loads(line) for line in output.decode(errors="replace").split("\n")[:-1]]
