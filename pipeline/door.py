"""How a door's process ends: its exit codes, its error lines, and which rank speaks."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable
from typing import NoReturn

SILENCE = 10.0  # seconds that ranks other than 0 leave it to report a problem


def end_process(code: int) -> NoReturn:
    """End a rank at once. The interpreter's own end would take down what is left of the process group, and that aborts
    it now and then."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def run_door(main: Callable[[], None]) -> NoReturn:
    """Run a door: exit 0, or print each problem and exit 2 on a ValueError of the user's input."""
    try:
        main()
    except ValueError as error:
        rank = int(os.environ.get("RANK", "0"))
        if rank:
            # Every rank finds the same problems, and a launcher ends all ranks with the first that exits: rank 0 is to
            # speak for them. Who still lives after a while has a problem of its own, such as a file its node lacks.
            time.sleep(SILENCE + 2 * int(os.environ.get("LOCAL_RANK", "0")))
        for line in str(error).splitlines():
            print(f"error: rank {rank}: {line}" if rank else f"error: {line}", file=sys.stderr)
        sys.exit(2)
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        end_process(0)
    sys.exit(0)
