"""One rank that opens checkpoints as a resumed run does and writes, as JSON lines, what is wrong with each."""

from __future__ import annotations

import json
import sys
from pathlib import Path

from pipeline.training.distributed import initialize_process_group, world
from pipeline.training.state import open_checkpoint
from tests.ranks import end_rank


def main() -> None:
    """FOLDER...: checkpoints."""
    here = world()
    initialize_process_group(here)
    for folder in sys.argv[1:]:
        try:
            open_checkpoint(here, Path(folder))
            problems = []
        except ValueError as error:
            problems = str(error).splitlines()
        if here.main:
            print("found", json.dumps(problems), flush=True)
    end_rank(here)


if __name__ == "__main__":
    main()
