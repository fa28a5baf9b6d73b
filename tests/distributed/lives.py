"""Runs of the doors on several ranks that start fast, and can be killed one by one."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tests.ranks import ROOT, free_port


class Life:
    """One run of a script on one or more ranks; each rank writes a log."""

    def __init__(
        self, ask: Callable[[dict[str, Any]], Any], script: str, argv: list[str], ranks: int, logs: Path
    ) -> None:
        self._ask = ask
        logs.mkdir(parents=True, exist_ok=True)
        shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "WORLD_SIZE": str(ranks)}
        shared["LOCAL_SIZE"] = str(ranks)
        self._logs = [logs / f"rank{rank}.log" for rank in range(ranks)]
        self.pids: list[int] = []
        for rank, log in enumerate(self._logs):
            log.unlink(missing_ok=True)
            env = {**shared, "RANK": str(rank), "LOCAL_RANK": str(rank)}
            self.pids.append(ask({"start": script, "argv": argv, "env": env, "log": str(log)}))

    def codes(self) -> list[int | None]:
        """The exit code of each rank, None while it lives."""
        return [self._ask({"poll": pid}) for pid in self.pids]

    def kill(self, *ranks: int) -> None:
        """kill -9 of some ranks (of all, if none is named) that may have ended already."""
        for rank, code in enumerate(self.codes()):
            if code is None and (not ranks or rank in ranks):
                os.kill(self.pids[rank], signal.SIGKILL)

    def wait(self, timeout: float = 120) -> list[int]:
        """The exit codes. A rank that has not ended in time is killed (-9)."""
        deadline = time.monotonic() + timeout
        while None in self.codes() and time.monotonic() < deadline:
            time.sleep(0.005)
        self.kill()
        while None in (codes := self.codes()):
            time.sleep(0.005)
        return [code for code in codes if code is not None]

    def output(self) -> str:
        """What all ranks printed."""
        return "".join(log.read_text(errors="replace") for log in self._logs if log.exists())


class Lives:
    """Starts scripts in children of one process that has imported everything."""

    def __init__(self) -> None:
        self._server = subprocess.Popen(
            [sys.executable, str(Path(__file__).with_name("fork_server.py"))],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=ROOT,
            env={**os.environ, "OMP_NUM_THREADS": "1", "TORCHINDUCTOR_COMPILE_THREADS": "1", "PYTHONPATH": str(ROOT)},
        )  # fmt: skip

    def start(self, script: str, *argv: str, ranks: int = 1, logs: Path) -> Life:
        """Run a script of the repository."""
        return Life(self._ask, script, list(argv), ranks, logs)

    def run(self, script: str, *argv: str, ranks: int = 1, logs: Path, timeout: float = 120) -> str:
        """Run a script to its end and return what it printed; any exit code but 0 is an error, and ends the others."""
        life = self.start(script, *argv, ranks=ranks, logs=logs)
        deadline = time.monotonic() + timeout
        while None in (codes := life.codes()) and not any(codes) and time.monotonic() < deadline:
            time.sleep(0.05)
        codes = life.wait(timeout=0)
        assert codes == [0] * ranks, f"{script} exited with {codes}:\n{life.output()[-6000:]}"
        return life.output()

    def _ask(self, request: dict[str, Any]) -> Any:
        assert self._server.stdin is not None
        assert self._server.stdout is not None
        self._server.stdin.write(json.dumps(request) + "\n")
        self._server.stdin.flush()
        return json.loads(self._server.stdout.readline())

    def close(self) -> None:
        """End the server; its children must have ended."""
        assert self._server.stdin is not None
        self._server.stdin.close()
        self._server.wait()


@contextmanager
def lives() -> Iterator[Lives]:
    """A server for as long as the block lasts."""
    server = Lives()
    try:
        yield server
    finally:
        server.close()


def metrics(run: Path) -> list[dict[str, float]]:
    """The whole lines of metrics.jsonl without what measures time; a kill may have torn the last one."""
    timing = ("tokens_per_second", "seconds_per_step")
    path = run / "metrics.jsonl"
    text = path.read_text(encoding="utf-8") if path.exists() else ""
    lines = [json.loads(line) for line in text[: text.rfind("\n") + 1].splitlines()]
    return [{name: value for name, value in line.items() if name not in timing} for line in lines]
