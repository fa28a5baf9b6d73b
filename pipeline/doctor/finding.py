"""What a check found, and running checks so that a broken one is a finding too."""

from __future__ import annotations

import subprocess
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

Level = Literal["ok", "warning", "failed"]
OK: Level = "ok"
WARNING: Level = "warning"
FAILED: Level = "failed"

UNITS = {0: "B", 3: "kB", 6: "MB", 9: "GB", 12: "TB"}
TOOL_SECONDS = 30.0  # for a compiler or nvidia-smi to say its version; a GPU that has fallen off the bus hangs it


@dataclass(frozen=True)
class Finding:
    """One row of the report.

    check: what was looked at; found: the value, in words; remedy: what to do about it, empty where all is well.
    same: values that every node must share; rates: values of which a node should not have far less than the others.
    """

    check: str
    level: Level
    found: str
    remedy: str = ""
    same: Mapping[str, str] = field(default_factory=dict)
    rates: Mapping[str, float] = field(default_factory=dict)


Check = tuple[str, Callable[[], Iterable[Finding]]]  # its name, for a check that breaks or hangs


def examine(checks: Iterable[Check], starting: Callable[[str], None]) -> Iterator[Finding]:
    """Run checks one after another, calling `starting(name)` before each; an exception is a failed finding."""
    for name, check in checks:
        starting(name)
        try:
            yield from check()
        except Exception as error:
            found = f"the check itself broke: {type(error).__name__}: {error}"
            yield Finding(name, FAILED, found, "look at this by hand; the other checks went on")


def missing(needed: bool) -> Level:
    """The level of something that is not there: failed where it is needed, else a warning."""
    return FAILED if needed else WARNING


def size(count: float) -> str:
    """Bytes as people read them: `43.1 GB`, powers of ten as disks are sold."""
    power = next((power for power in (12, 9, 6, 3) if count >= 10**power), 0)
    return f"{count / 10**power:.{1 if power else 0}f} {UNITS[power]}"


def last_line(text: str) -> str:
    """The last line that says something, shortened."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return lines[-1][:300] if lines else ""


def tool_output(command: Sequence[str]) -> str:
    """What a tool prints. Errors: RuntimeError with its last line if it fails, is missing or hangs."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, errors="replace", timeout=TOOL_SECONDS)
    except OSError as error:
        raise RuntimeError(f"{command[0]}: {error.strerror}") from error
    except subprocess.TimeoutExpired as error:
        raise RuntimeError(f"{command[0]} did not answer in {TOOL_SECONDS:g} s") from error
    if done.returncode:
        raise RuntimeError(last_line(done.stderr) or last_line(done.stdout) or f"exit code {done.returncode}")
    return done.stdout
