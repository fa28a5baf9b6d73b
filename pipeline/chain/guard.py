"""Runs the command of one stage, and ends its whole process group when the runner that asked for it is gone.

`guard.py FD COMMAND ...`: FD is the read end of a pipe whose write end only the runner holds, so it closes however the
runner ends, by SIGKILL as well. The exit code is the command's (128 + signal if one killed it). It also ends what the
command leaves behind, such as the ranks of a launcher that died. Standard library only: it has to start fast.
"""

from __future__ import annotations

import ctypes
import os
import select
import signal
import subprocess
import sys
import time

GRACE_SECONDS = 15.0  # between SIGTERM and SIGKILL
_PR_SET_CHILD_SUBREAPER = 36  # linux/prctl.h


def end_group(group: int) -> None:
    """SIGTERM to a process group, SIGKILL after GRACE_SECONDS, and return when none of its processes is left."""
    deadline = time.monotonic() + GRACE_SECONDS
    send = signal.SIGTERM
    while True:
        try:
            os.killpg(group, send)
        except ProcessLookupError:
            return
        while time.monotonic() < deadline or send == signal.SIGKILL:
            try:
                while os.waitpid(-group, os.WNOHANG)[0]:
                    pass
            except ChildProcessError:  # all are reaped: each was this process' child, or became it as an orphan
                return
            time.sleep(0.02)
        send = signal.SIGKILL


def main() -> int:
    pipe, command = int(sys.argv[1]), sys.argv[2:]
    # Orphans of the group become children of this process, so that end_group can wait for them.
    ctypes.CDLL(None).prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    stage = subprocess.Popen(command, process_group=0)
    try:
        while stage.poll() is None:
            if select.select([pipe], [], [], 0.1)[0]:
                print("chain: the runner is gone, so this stage ends", file=sys.stderr, flush=True)
                return 128 + signal.SIGTERM
        return stage.returncode if stage.returncode >= 0 else 128 - stage.returncode
    finally:
        end_group(stage.pid)


if __name__ == "__main__":
    sys.exit(main())
