"""Being asked to stop, or to save now: signals of the scheduler and switch files of the user, agreed by all ranks.

SIGUSR1 and SIGTERM (what Slurm sends before a time limit, at a preemption and by scancel) save this step and end with
code 85. A file SAVE in the run folder saves and goes on; a file STOP saves and ends with code 86, and no start goes on
while it lies there. Some ranks hear of it sooner than others, so what was asked travels in a sum over the ranks that
the step has anyway, and all act at the same step.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Sequence
from pathlib import Path
from types import FrameType

from pipeline.slurm_job import HALTED, STOPPED, ask_for_requeue

SIGNALS = (signal.SIGUSR1, signal.SIGTERM)
SAVE, STOP = "SAVE", "STOP"

_heard: list[str] = []  # names of the signals that came; a handler may do no more than remember them
_nothing_to_save = True


class Stopped(Exception):
    """All ranks have saved the same step, and are to end with `code`."""

    def __init__(self, code: int, reason: str) -> None:
        super().__init__(reason)
        self.code = code


def listen() -> None:
    """Hear the signals from now on; until `training_begins`, which is before ranks know each other, one ends this
    process at once. Rank 0 asks for the requeue: a launcher sends SIGTERM to ranks as well when another one failed."""

    def hear(number: int, frame: FrameType | None) -> None:
        _heard.append(signal.Signals(number).name)
        if _nothing_to_save:
            # Of the ranks' exit codes srun takes the highest, which must stay another rank's failure.
            if (os.environ.get("RANK") or os.environ.get("SLURM_PROCID", "0")) != "0":
                os._exit(0)
            ask_for_requeue(STOPPED, f"{_heard[-1]} before training began")
            os._exit(STOPPED)

    for each in SIGNALS:
        signal.signal(each, hear)


def training_begins() -> None:
    """From here on a signal is only remembered, for `Requests`."""
    global _nothing_to_save
    _nothing_to_save = False


class Requests:
    """What any rank was asked, the same on all of them once `agree` has run."""

    def __init__(self, folder: Path, *, main: bool) -> None:
        """folder: the run's; main: this rank looks for the switch files."""
        self.folder = folder
        self.main = main
        self.stopped = self.halted = self.save = False

    @property
    def any(self) -> bool:
        """A checkpoint is asked for."""
        return self.end or self.save

    @property
    def end(self) -> bool:
        """The run is to end after saving."""
        return self.stopped or self.halted

    def mine(self) -> list[float]:
        """What this rank knows, as numbers to be summed over the ranks: stop, halt, save."""
        here = [self.main and (self.folder / name).exists() for name in (STOP, SAVE)]
        return [float(bool(_heard)), *map(float, here)]

    def agree(self, sums: Sequence[float]) -> None:
        """Take the sums of all ranks' `mine`."""
        stopped, halted, save = (each > 0 for each in sums)
        self.stopped, self.halted, self.save = self.stopped or stopped, self.halted or halted, save

    def saved(self) -> None:
        """What SAVE asked for is done."""
        if self.main and self.save:
            (self.folder / SAVE).unlink(missing_ok=True)
        self.save = False

    def exception(self, saved: str) -> Stopped:
        """Why the run ends, with the name of the checkpoint it can go on from."""
        if self.halted:
            return Stopped(HALTED, f"the file {self.folder / STOP} asked to stop: {saved}; remove it to go on")
        return Stopped(
            STOPPED, f"stopped by {' and '.join(dict.fromkeys(_heard)) or 'a signal to another rank'}: {saved}"
        )


def check_switches(folder: Path) -> None:
    """Errors: ValueError if the run was told to stop and nobody took that back."""
    if (folder / STOP).exists():
        raise ValueError(f"--output_dir {folder}: the file {STOP} there keeps the run from going on: remove it")
