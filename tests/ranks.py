"""Start a worker script as several gloo ranks on this machine, as a launcher would."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import tempfile
import time
from contextlib import ExitStack
from pathlib import Path
from typing import NoReturn

from pipeline.door import end_process
from pipeline.training.distributed import World, leave_process_group

ROOT = Path(__file__).resolve().parents[1]


def free_port() -> int:
    """A TCP port nobody listens on now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def end_rank(here: World) -> NoReturn:
    """The end of a worker's process, as that of a door's: why not simply return, `leave_process_group` says."""
    leave_process_group(here)
    end_process(0)


def run_ranks(script: Path | str, *arguments: str, ranks: int, timeout: float = 600) -> list[str]:
    """Run `python script arguments` on every rank and return each one's output; a failing rank fails the test and ends
    the others."""
    shared = {
        **os.environ, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "WORLD_SIZE": str(ranks),
        "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT),
    }  # fmt: skip
    with ExitStack() as open_files:
        # Files, not pipes: a rank whose pipe is full while another's is being read would hang them all.
        logs = [open_files.enter_context(tempfile.TemporaryFile("w+")) for _ in range(ranks)]
        processes = [
            subprocess.Popen(
                [sys.executable, str(script), *arguments], cwd=ROOT, stdout=log, stderr=subprocess.STDOUT,
                env={**shared, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            )
            for rank, log in enumerate(logs)
        ]  # fmt: skip
        deadline = time.monotonic() + timeout
        try:
            while any(process.poll() is None for process in processes) and time.monotonic() < deadline:
                if any(process.poll() not in (None, 0) for process in processes):
                    break
                time.sleep(0.1)
        finally:
            codes = [process.poll() for process in processes]
            for process in processes:
                process.kill()
                process.wait()
        outputs = []
        for log in logs:
            log.seek(0)
            outputs.append(log.read())
    for rank, (code, output) in enumerate(zip(codes, outputs, strict=True)):
        assert code == 0, f"rank {rank} exited with {code} (None: it did not end in time):\n{output[-4000:]}"
    return outputs
