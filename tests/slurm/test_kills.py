"""What dies without a word: a rank, a slurmstepd, the batch shell, a slurmd."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from pipeline.checkpoints.markers import newest_complete
from tests.slurm.cluster import KILL_WAIT, Cluster
from tests.slurm.jobs import Job, Submitter, losses, submitting, until

WAIT = 30  # --wait of slurm/launch.sh, seconds
SLACK = 30  # for a machine that has more to do
STEPS = ("--max_steps", "100")


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


@dataclass
class Orphaned:
    """A job whose slurmstepd on its second node was killed."""

    submit: Submitter
    job: Job
    killed: float  # Unix time


@pytest.fixture(scope="module", autouse=True)
def orphaned(
    cluster: Cluster, recipe: Path, site: dict[str, str], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Orphaned]:
    """Beside the other tests: srun waits for the lost task as long as it may."""
    with submitting(cluster, tmp_path_factory.mktemp("orphaned"), site) as submit:
        job = submit("job", "--config", recipe, *STEPS, options=("-N2", "--partition=aside"), faults="slow:0.3")
        job.wait_for_step(12)
        os.kill(max(processes("slurmstepd", f"[{job.id}.0]")), signal.SIGKILL)
        yield Orphaned(submit, job, time.time())


def goes_on(submit: Submitter, job: Job, recipe: Path, faults: str = "") -> Job:
    """The next start of a job's run, after making sure that nothing is left of the job."""
    until(lambda: not ranks(job), "no rank is left", 20)
    newest, last = newest_complete(job.run), losses(job.metrics())[-1][0]
    assert newest is not None
    again = submit(
        "job", "--config", recipe, *STEPS, options=("-N2", f"--partition={job.field('Partition')}"), faults=faults
    )
    again.wait_for_step(last + 1)
    assert f"resumed from {newest}" in again.text()
    return again


def test_a_killed_rank_or_batch_shell_ends_the_job_and_a_killed_slurmd_does_not(
    cluster: Cluster, submit: Submitter, recipe: Path
) -> None:
    job = submit("job", "--config", recipe, *STEPS, faults="slow:0.3")
    job.wait_for_step(12)
    victim = next(pid for pid in ranks(job) if b"SLURM_PROCID=1\0" in Path(f"/proc/{pid}/environ").read_bytes())
    os.kill(victim, signal.SIGKILL)
    assert job.wait(WAIT + SLACK) == "FAILED"
    assert job.restarts() == 0

    job = goes_on(submit, job, recipe, faults="slow:0.3")
    os.kill(processes("slurm_script", f"job{int(job.id):05d}")[0], signal.SIGKILL)
    assert job.wait(WAIT + SLACK) != "COMPLETED"

    job = goes_on(submit, job, recipe, faults="slow:0.3")
    step = losses(job.metrics())[-1][0]
    cluster.kill_node("n2")
    job.wait_for_step(step + 10)
    cluster.start_node("n2")
    assert job.wait() == "COMPLETED"
    assert job.restarts() == 0
    assert [step for step, *_ in losses(job.metrics())] == list(range(1, 101))


def test_a_killed_slurmstepd_ends_the_job_within_the_wait(orphaned: Orphaned, recipe: Path) -> None:
    job = orphaned.job
    assert job.wait() not in ("COMPLETED", "CANCELLED")
    assert job.ended() - orphaned.killed < WAIT + KILL_WAIT + SLACK
    again = goes_on(orphaned.submit, job, recipe)
    assert again.wait() == "COMPLETED"
    assert [step for step, *_ in losses(again.metrics())] == list(range(1, 101))
