"""Realigns in forked processes, so that the imports are paid once. Prints JSON.

kills MODELS OUT: kills a realignment before its first rename or removal of a file, another before its second, and so
on until the folder is there; each is then run again to its end. Prints the folders.
memory OUT MODELS...: the peak resident set of each realignment, and what its plan said.
"""

from __future__ import annotations

import json
import os
import re
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from pipeline.checkpoints import weights_out
from pipeline.realignment.run import realign
from tests.realign_models import arguments

SETTINGS: dict[str, Any] = {"max_shard_size": "60KB"}


def in_child(work: Callable[[], None]) -> int:
    """The exit status."""
    child = os.fork()
    if child == 0:
        work()
        os._exit(0)
    return os.waitpid(child, 0)[1]


def killed_at(models: Path, out: Path, point: int) -> bool:
    """Whether it was killed, and did not end before."""

    def work() -> None:
        for name in ("rename", "replace", "unlink"):
            setattr(os, name, counted(getattr(os, name)))
        realign(arguments(models, out, **SETTINGS))

    calls = 0

    def counted(call: Callable[..., None]) -> Callable[..., None]:
        def run(*words: Any, **keywords: Any) -> None:
            nonlocal calls
            calls += 1
            if calls > point:
                os.kill(os.getpid(), signal.SIGKILL)
            call(*words, **keywords)

        return run

    return in_child(work) == signal.SIGKILL


def kills(models: Path, out: Path) -> None:
    found: list[str] = []
    while True:
        folder = out / str(len(found))
        assert killed_at(models, folder, len(found))
        if folder.exists():
            break
        realign(arguments(models, folder, **SETTINGS))
        found.append(str(folder))
    print(json.dumps(found))


def memory(out: Path, folders: list[Path]) -> None:
    weights_out.PIECE_BYTES = 2**20  # else the buffers of a file that is written fill up with its size, to 64 MiB
    found = []
    for models in folders:
        log = out / f"{models.name}.log"

        def work(models: Path = models, log: Path = log) -> None:
            os.dup2(os.open(log, os.O_WRONLY | os.O_CREAT), 2)
            Path("/proc/self/clear_refs").write_text("5")  # the peak begins here
            realign(arguments(models, out / models.name, unsafe="model", eta=0.5))
            peak = re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())
            assert peak is not None
            log.with_suffix(".peak").write_text(str(1024 * int(peak[1])))

        assert in_child(work) == 0, log.read_text()
        planned = re.search(r"host memory below ([\d.]+) MiB", log.read_text())
        assert planned is not None
        found.append({"peak": int(log.with_suffix(".peak").read_text()), "plan": float(planned[1]) * 2**20})
    print(json.dumps(found))


def main() -> None:
    what, *words = sys.argv[1:]
    if what == "kills":
        kills(Path(words[0]), Path(words[1]))
    else:
        memory(Path(words[0]), [Path(each) for each in words[1:]])


if __name__ == "__main__":
    main()
