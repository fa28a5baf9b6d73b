"""What dies without a word: a rank, a slurmstepd, the batch shell, a slurmd."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.slurm.cluster import Cluster
from tests.slurm.jobs import Job, Submitter, losses, until

WAIT = 60  # --wait of slurm/launch.sh, seconds


def processes(*words: str) -> list[int]:
    """Ids of the living processes whose command line holds all these words."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            line = (folder / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
            state = (folder / "stat").read_text().rpartition(")")[2].split()[0]
        except OSError:
            continue
        if state != "Z" and all(word in line for word in words):
            found.append(int(folder.name))
    return found


def ranks(job: Job) -> list[int]:
    return processes("pipeline/train.py", str(job.run), "--resume_from_checkpoint")


@pytest.fixture
def job(submit: Submitter, recipe: Path) -> Iterator[Job]:
    """A run past its first checkpoint."""
    job = submit("job", "--config", recipe, "--max_steps", "400")
    job.wait_for_step(12)
    yield job
    job.cancel()


def ended(job: Job) -> None:
    """Asserts that the job ends within the wait, leaves nothing behind, and goes on from its last checkpoint."""
    began = time.monotonic()
    job.wait()
    assert time.monotonic() - began < WAIT + 20
    until(lambda: not ranks(job), "no rank is left", 20)


def goes_on(submit: Submitter, job: Job, recipe: Path) -> None:
    again = submit("job", "--config", recipe, "--max_steps", "400")
    until(lambda: "resumed from" in again.text(), f"the next start resumes:\n{again.text()}")
    assert f"resumed from {job.run}/checkpoint-" in again.text()
    again.wait_for_step(losses(job.metrics())[-1][0] + 1)
    again.cancel()


def test_sigkill_of_one_rank(submit: Submitter, job: Job, recipe: Path) -> None:
    victim = next(pid for pid in ranks(job) if b"SLURM_PROCID=1\0" in Path(f"/proc/{pid}/environ").read_bytes())
    os.kill(victim, signal.SIGKILL)
    ended(job)
    assert job.state() == "FAILED"
    assert job.restarts() == 0
    goes_on(submit, job, recipe)


def test_sigkill_of_a_slurmstepd(submit: Submitter, job: Job, recipe: Path) -> None:
    os.kill(processes("slurmstepd", f"[{job.id}.0]")[-1], signal.SIGKILL)
    ended(job)
    assert job.state() != "COMPLETED"
    goes_on(submit, job, recipe)


def test_sigkill_of_the_batch_shell(submit: Submitter, job: Job, recipe: Path) -> None:
    os.kill(processes("slurm_script", f"job{int(job.id):05d}")[0], signal.SIGKILL)
    ended(job)
    assert job.state() != "COMPLETED"
    goes_on(submit, job, recipe)


def test_a_killed_slurmd_does_not_disturb(cluster: Cluster, submit: Submitter, recipe: Path) -> None:
    job = submit("job", "--config", recipe, "--max_steps", "60")
    job.wait_for_step(5)
    cluster.kill_node("n2")
    job.wait_for_step(50)
    cluster.start_node("n2")
    assert job.wait() == "COMPLETED"
    assert job.restarts() == 0
    assert [step for step, *_ in losses(job.metrics())] == list(range(1, 61))
