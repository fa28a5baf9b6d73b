"""Ends a run in which a rank does something else than the others, or in which nothing moves any more, and says which
rank it is, long before the collectives' own time-out.

Every rank has a thread that tells its heartbeat through a TCPStore, which works while the main threads are stuck in a
collective. Rank 0's thread judges. At a verdict every rank writes the stacks of its threads to its log and ends.
"""

from __future__ import annotations

import faulthandler
import json
import os
import socket
import sys
import threading
import time
import traceback
from dataclasses import asdict
from datetime import timedelta
from pathlib import Path
from typing import Any

from pipeline.slurm_job import HUNG, ask_for_requeue
from pipeline.training.distributed import World
from pipeline.training.divergence import divergence, stragglers, table
from pipeline.training.heartbeat import Beat, Heart
from pipeline.training.manifest import write_json

INTERVAL = 3.0  # seconds between two beats
LAST_WORDS = 10.0  # seconds that rank 0 leaves the others to write their stacks, and they leave it to speak
EXIT_SECONDS = 2.0  # that rank 0 ends after the others: a launcher ends all with the first that fails
FRAMES = 12


class Watchdog:
    """One rank's thread. Close it before the process group is destroyed."""

    def __init__(self, here: World, heart: Heart, minutes: float, folder: Path) -> None:
        """minutes: without any progress until the run is ended; folder: the run's, for heartbeat.json."""
        import torch.distributed as dist

        stores: Any = dist  # whose type information leaves the stores out
        # A connection of its own to the server of the process group: torch's blocks while it waits for a key.
        server = stores.TCPStore(
            os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), is_master=False,
            timeout=timedelta(seconds=60), wait_for_workers=False,
        )  # fmt: skip
        self.store = stores.PrefixStore("watchdog", server)
        self.here, self.heart, self.seconds, self.folder = here, heart, 60 * minutes, folder
        self.node = os.environ.get("SLURMD_NODENAME") or socket.gethostname()
        # Of a task of srun: its slurmstepd. Nobody else would end a rank whose slurmstepd was killed.
        self._parent = os.getppid() if "SLURM_STEP_NUM_TASKS" in os.environ else None
        self._main = threading.main_thread().ident
        self._closed = threading.Event()
        self._moved: dict[int, tuple[Any, float]] = {}  # each rank's last progress, and when rank 0 saw it
        self._thread = threading.Thread(target=self._run, name="watchdog", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """End the thread."""
        self._closed.set()
        self._thread.join()

    def after_error(self) -> None:
        """A collective failed here, perhaps because another rank called a different one: let the watchdogs find out.
        Does not return if they do."""
        self._closed.wait(4 * INTERVAL)

    def _run(self) -> None:
        try:
            while not self._closed.wait(INTERVAL):
                if self._parent not in (None, os.getppid()):
                    os._exit(1)
                self._tell()
                if self.here.main:
                    self._judge()
                else:
                    self._look_at_rank_0()
                if self.store.check(["verdict"]):
                    self._end(self.store.get("verdict").decode())
        except RuntimeError as error:  # the server went with rank 0
            if not self._closed.is_set():
                reason = str(error).splitlines()[0]
                print(f"watchdog of rank {self.here.rank} ({self.node}): rank 0 is gone ({reason})", file=sys.stderr)

    def _tell(self) -> None:
        beat = self.heart.beat(self.here.rank, self.node, self._stack())
        self.store.set(f"beat/{self.here.rank}", json.dumps(asdict(beat)))

    def _stack(self) -> list[str]:
        """The main thread's innermost frames."""
        frame = sys._current_frames().get(self._main or 0)
        frames = traceback.extract_stack(frame)[-FRAMES:] if frame is not None else []
        return [f"{each.filename}:{each.lineno} {each.name}" for each in frames]

    def _beats(self) -> list[Beat]:
        keys = [f"beat/{rank}" for rank in range(self.here.size)]
        return [Beat(**json.loads(self.store.get(key))) for key in keys if self.store.check([key])]

    def _judge(self) -> None:
        beats, now = self._beats(), time.monotonic()
        if self.folder.is_dir():
            write_json(self.folder / "heartbeat.json", [asdict(beat) for beat in beats])
        for beat in beats:
            progress = (beat.calls, beat.phase, beat.step)
            if self._moved.get(beat.rank, (None, 0.0))[0] != progress:
                self._moved[beat.rank] = (progress, now)
        if found := divergence(beats):
            self._sentence(f"ranks diverge: {found}", beats)
        elif self._moved and now - max(moved for _, moved in self._moved.values()) > self.seconds:
            self._sentence(f"no rank has moved for {self.seconds / 60:g} minutes: {stragglers(beats)}", beats)

    def _look_at_rank_0(self) -> None:
        """Rank 0 judges only while it lives and its interpreter runs."""
        if not self.store.check(["beat/0"]):
            return
        beat, now = self.store.get("beat/0"), time.monotonic()
        if self._moved.get(0, (None, 0.0))[0] != beat:
            self._moved[0] = (beat, now)
        elif now - self._moved[0][1] > self.seconds + LAST_WORDS:
            self._sentence(f"rank 0 has said nothing for {self.seconds / 60:g} minutes, not even that it hangs", [])

    def _sentence(self, verdict: str, beats: list[Beat]) -> None:
        ask_for_requeue(HUNG, verdict)  # first: whatever ends this process now, the job is requeued
        lines = ["error: watchdog: " + verdict, *table(beats)]
        self.store.set("verdict", "\n".join(lines))

    def _end(self, verdict: str) -> None:
        """Write this rank's stacks, and end it; rank 0 says the verdict and goes last."""
        print(f"watchdog of rank {self.here.rank} ({self.node}): stacks of all threads", file=sys.stderr, flush=True)
        faulthandler.dump_traceback(file=sys.stderr, all_threads=True)
        self.store.set(f"dumped/{self.here.rank}", "")
        deadline = time.monotonic() + LAST_WORDS
        if not self.here.main:
            while not self.store.check(["spoken"]):
                if time.monotonic() > deadline:
                    print(verdict, file=sys.stderr, flush=True)
                    break
                time.sleep(0.1)
            os._exit(0)
        others = [f"dumped/{rank}" for rank in range(1, self.here.size)]
        while time.monotonic() < deadline and not all(self.store.check([key]) for key in others):
            time.sleep(0.1)
        print(verdict, file=sys.stderr, flush=True)
        self.store.set("spoken", "")
        time.sleep(EXIT_SECONDS)
        os._exit(HUNG)
