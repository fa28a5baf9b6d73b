"""Several processes that share one evaluation: ranks of a launcher, or --num_workers on this machine.

They meet in the output folder alone, so no process group is needed and none times out.
"""

from __future__ import annotations

import multiprocessing
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.process import BaseProcess
from typing import Any

import torch

from pipeline.training.distributed import World

POLL = 0.1  # seconds between two looks into the folder


@dataclass
class Crew:
    """This worker among all of an evaluation.

    parent: process id of the worker 0 that started this one; None if a launcher did, or nobody.
    others: the processes that this one started.
    """

    rank: int = 0
    size: int = 1
    parent: int | None = None
    others: tuple[BaseProcess, ...] = ()

    @property
    def main(self) -> bool:
        """Worker 0 writes the records."""
        return self.rank == 0

    def check(self) -> None:
        """Errors: ValueError if another worker has died, SystemExit if the one that started this has."""
        if self.parent is not None and os.getppid() != self.parent:
            raise SystemExit(1)
        for rank, other in enumerate(self.others, 1):
            if other.exitcode:
                raise ValueError(
                    f"--num_workers: worker {rank} ended with code {other.exitcode}; its message is above"
                )

    def wait(self, ready: Callable[[], bool]) -> None:
        """Until `ready`. Errors: as `check`."""
        while not ready():
            self.check()
            time.sleep(POLL)

    def join(self) -> None:
        """Waits for the workers started here. Errors: as `check`."""
        for other in self.others:
            other.join()
        self.check()


def launched(here: World, num_workers: int) -> Crew:
    """The crew before `start`: of a launcher's ranks, or of this process and those it will start.

    Errors: ValueError for --num_workers under a launcher of several ranks, or below 1.
    """
    if num_workers < 1:
        raise ValueError(f"--num_workers {num_workers}: must be at least 1")
    if here.size == 1:
        return Crew(size=num_workers)
    if num_workers > 1:
        raise ValueError(f"--num_workers {num_workers}: the launcher started {here.size} ranks already; leave it out")
    _take_device(here.local_rank, here.size)
    return Crew(here.rank, here.size)


def start(crew: Crew, work: Callable[..., None], *arguments: Any) -> Crew:
    """Starts the other workers of this process, each with `work(*arguments, crew)`; they end when it ends."""
    context = multiprocessing.get_context("spawn")  # a forked process cannot use CUDA
    others = []
    for rank in range(1, crew.size):
        mine = Crew(rank, crew.size, parent=os.getpid())
        others.append(context.Process(target=_run, args=(work, arguments, mine), daemon=True))
        others[-1].start()
    _take_device(0, crew.size)
    return Crew(0, crew.size, others=tuple(others))


def _run(work: Callable[..., None], arguments: tuple[Any, ...], crew: Crew) -> None:
    _take_device(crew.rank, crew.size)
    try:
        work(*arguments, crew)
    except ValueError as error:
        print(f"error: worker {crew.rank}: {error}", flush=True)
        raise SystemExit(2) from error


def _take_device(number: int, size: int) -> None:
    """One GPU each, or a share of the cores."""
    if torch.cuda.is_available():
        torch.cuda.set_device(number % torch.cuda.device_count())
    else:
        torch.set_num_threads(max(1, torch.get_num_threads() // size))
