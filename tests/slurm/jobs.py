"""Jobs of the templates on the little cluster: submitted as a user does, followed, looked at."""

from __future__ import annotations

import json
import re
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any

from tests.slurm.cluster import Cluster

PATIENCE = 240.0  # seconds for anything that should happen
ENDED = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "PREEMPTED", "OUT_OF_MEMORY", "BOOT_FAIL")


def until(true: Callable[[], object], what: str, seconds: float = PATIENCE) -> None:
    """Wait until something is true; fails the test if it does not become so in time."""
    deadline = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < deadline, f"not in {seconds:g} s: {what}"
        time.sleep(0.2)


@dataclass
class Job:
    """A job that was submitted. run: its run folder; log: what a user follows."""

    cluster: Cluster
    id: str
    run: Path
    log: Path

    def field(self, name: str) -> str:
        """One field of `scontrol show job`."""
        shown = self.cluster.run("scontrol", "show", "job", self.id).stdout
        found = re.search(rf"\b{name}=(\S*)", shown)
        assert found, shown
        return found[1]

    def state(self) -> str:
        return self.field("JobState")

    def restarts(self) -> int:
        return int(self.field("Restarts"))

    def text(self) -> str:
        return self.log.read_text() if self.log.exists() else ""

    def wait(self, seconds: float = PATIENCE) -> str:
        """Until it has ended; its last state."""
        until(lambda: self.state() in ENDED, f"the end of job {self.id}:\n{self.text()[-3000:]}", seconds)
        return self.state()

    def ended(self) -> float:
        """When, in Unix time."""
        return datetime.fromisoformat(self.field("EndTime")).timestamp()

    def exit_code(self) -> int:
        return int(self.field("ExitCode").partition(":")[0])

    def metrics(self) -> list[dict[str, Any]]:
        path = self.run / "metrics.jsonl"
        return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []

    def wait_for_step(self, step: int) -> None:
        def reached() -> bool:
            assert self.state() not in ENDED, f"job {self.id} ended before step {step}:\n{self.text()[-3000:]}"
            return any(line["step"] >= step for line in self.metrics())

        until(reached, f"step {step} of job {self.id}:\n{self.text()[-3000:]}")


Curve = list[tuple[int, float, float]]  # step, loss, gradient norm


def losses(metrics: Sequence[dict[str, Any]]) -> Curve:
    """The curve that two runs are compared by."""
    return [(line["step"], line["loss"], line["grad_norm"]) for line in metrics if "loss" in line]


@dataclass
class Submitter:
    """Submits jobs whose files lie below one folder. variables: of the jobs' environment."""

    cluster: Cluster
    folder: Path
    variables: dict[str, str]
    ids: list[str] = field(default_factory=list)

    def __call__(
        self, name: str, *words: str | Path, options: Sequence[str] = ("-N2",), faults: str = "", **variables: str
    ) -> Job:
        """sbatch OPTIONS slurm/surgery_70b.sh WORDS, on CPUs; a second job of this name goes on with the first's run.
        faults: see faulty.py."""
        if faults:
            variables |= {"PYTHON": self.variables["FAULTY_PYTHON"], "FAULTS": faults}
        done = self.sbatch(name, *words, options=options, **variables)
        assert done.returncode == 0, done.stderr
        self.ids.append(done.stdout.strip())
        return Job(self.cluster, self.ids[-1], self.folder / name, self.folder / f"{name}-{self.ids[-1]}.log")

    def sbatch(
        self, name: str, *words: str | Path, options: Sequence[str] = ("-N2",), **variables: str
    ) -> subprocess.CompletedProcess[str]:
        """The finished sbatch command."""
        return self.cluster.run(
            "sbatch", "--parsable", "--gpus-per-node=0", f"--job-name={name}", f"--output={self.folder / name}-%j.log",
            *options, "slurm/surgery_70b.sh", "--output_dir", self.folder / name, *words,
            variables=self.variables | variables,
        )  # fmt: skip


@contextmanager
def submitting(cluster: Cluster, folder: Path, site: dict[str, str]) -> Iterator[Submitter]:
    """A Submitter; what is left of its jobs ends with the block."""
    submit = Submitter(cluster, folder, site)
    yield submit
    if submit.ids:
        cluster.run("scancel", *submit.ids)
