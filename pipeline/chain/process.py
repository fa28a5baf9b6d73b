"""One stage as a process: its output in a log, a sign of life on the terminal, and no way to outlive the runner."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import TextIO

from pipeline.chain import guard

HEARTBEAT_SECONDS = 60.0
PRIVATE_UMASK = 0o077
CLEAR = "\r\x1b[K"  # back to the start of the terminal's line, and empty it


class Stopped(Exception):
    """The runner was asked to stop by a signal."""

    def __init__(self, number: int) -> None:
        super().__init__(f"stopped by {signal.Signals(number).name}")
        self.exit_code = 128 + number


@contextmanager
def stopping() -> Iterator[None]:
    """SIGINT, SIGTERM and SIGHUP raise Stopped, so that the runner says how things stand before it ends.

    One that is ignored, as SIGHUP is under nohup, stays ignored.
    """

    def stop(number: int, frame: FrameType | None) -> None:
        raise Stopped(number)

    numbers = [
        each for each in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP) if signal.getsignal(each) != signal.SIG_IGN
    ]
    before = {number: signal.signal(number, stop) for number in numbers}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def run_logged(command: Sequence[str], log: Path, *, label: str, lock: int, private: bool) -> int:
    """Run a command under a guard, append what it prints to `log`, and return its exit code (128 + signal if killed).

    The command is a process group of its own that ends with this process, however that ends. `private` keeps what it
    writes from every other user.
    """
    log.parent.mkdir(parents=True, exist_ok=True)
    read_end, write_end = os.pipe()
    with (
        open(read_end),
        open(write_end, "w") as leash,
        log.open("a", encoding="utf-8") as output,
        log.open(encoding="utf-8", errors="replace") as written,
    ):
        print(f"$ {shlex.join(command)}", file=output, flush=True)
        written.seek(0, os.SEEK_END)
        process = subprocess.Popen(
            [sys.executable, "-I", guard.__file__, str(read_end), *command],
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,  # Ctrl-C on the terminal reaches the runner alone, which then ends the stage
            pass_fds=(read_end, lock),
            umask=PRIVATE_UMASK if private else -1,
            env=os.environ | {"PYTHONUNBUFFERED": "1"},
        )
        try:
            return _follow(process, written, label)
        finally:
            leash.close()
            process.wait()


def _follow(process: subprocess.Popen[bytes], written: TextIO, label: str) -> int:
    """Wait for a process, showing the time and its last line: up to date on a terminal, now and then in a log."""
    live = sys.stdout.isatty()
    start = shown = time.monotonic()
    last = ""
    try:
        while True:
            try:
                return process.wait(timeout=0.5)
            except subprocess.TimeoutExpired:
                last = _last_line(written.read()) or last
            now = time.monotonic()
            line = f"{label}  {minutes(now - start)}  {last}"
            if live:
                print(CLEAR + line[: shutil.get_terminal_size().columns - 1], end="", flush=True)
            elif now - shown >= HEARTBEAT_SECONDS:
                print(line, flush=True)
                shown = now
    finally:
        if live:
            print(CLEAR, end="", flush=True)


def _last_line(text: str) -> str:
    """The last line that says something, as one that cannot move a terminal's cursor."""
    lines = [line.strip() for line in re.split(r"[\r\n]", text) if line.strip()]
    return "".join(char for char in lines[-1] if char.isprintable()) if lines else ""


def minutes(seconds: float) -> str:
    """A time as people read it: `3 min 05 s`."""
    whole, rest = divmod(round(seconds), 60)
    return f"{whole} min {rest:02} s" if whole else f"{rest} s"
