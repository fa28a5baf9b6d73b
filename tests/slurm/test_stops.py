"""Signals, preemption, the time limit and the switch files: saved, requeued, and continued to the very same curve."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.slurm.cluster import Cluster
from tests.slurm.jobs import Job, Submitter, losses, until

LONG = ("--max_steps", "400")


@pytest.fixture(scope="module")
def curve(cluster: Cluster, recipe: Path, site: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> Job:
    """A run that nobody disturbs."""
    job = Submitter(cluster, tmp_path_factory.mktemp("undisturbed"), site)("job", "--config", recipe, *LONG)
    assert job.wait() == "COMPLETED", job.text()
    return job


def follows(job: Job, undisturbed: Job) -> None:
    """Asserts that a run has ended with the same losses and gradient norms at every step, bit for bit."""
    assert job.wait() == "COMPLETED", job.text()
    assert losses(job.metrics()) == losses(undisturbed.metrics())


def requeued(job: Job, restart: int = 0) -> dict[str, object]:
    """Wait until the job's start number `restart` has ended; the marker it left."""
    until(lambda: job.restarts() > restart, f"a requeue of job {job.id}")
    marker: dict[str, object] = json.loads((job.run / f"logs/{job.id}-{restart}/requeue.json").read_text())
    return marker


def test_scancel_usr1_saves_this_step_and_starts_again(submit: Submitter, recipe: Path, curve: Job) -> None:
    job = submit("job", "--config", recipe, *LONG)
    job.wait_for_step(13)
    job.cluster.run("scancel", "--signal=USR1", job.id)
    marker = requeued(job)
    assert marker["code"] == 85
    saved = int(str(marker["reason"]).rpartition("checkpoint-")[2])
    assert f"stopped by SIGUSR1: checkpoint-{saved}" in job.text()
    follows(job, curve)
    assert job.restarts() == 1
    assert json.loads((job.run / "run.json").read_text())["resumed_from"].endswith(f"checkpoint-{saved}")


@pytest.mark.parametrize("partition", ["low", "nograce"])
def test_preemption_with_and_without_grace_requeues_once(
    submit: Submitter, recipe: Path, curve: Job, partition: str, tmp_path: Path
) -> None:
    job = submit("job", "--config", recipe, *LONG, options=("-N2", f"--partition={partition}"))
    job.wait_for_step(13)
    urgent = tmp_path / "urgent.sh"
    urgent.write_text("#!/bin/sh\nsleep 5\n")
    job.cluster.run("sbatch", "-N2", "--exclusive", "--partition=high", f"--output={tmp_path}/urgent.log", urgent)
    marker = requeued(job)
    assert marker["code"] == 85
    follows(job, curve)
    assert job.restarts() == 1
    by_script = "requeued: " in job.text()
    assert by_script == (partition == "low")
    assert ("the scheduler has requeued" in job.text()) == (partition == "nograce")


def test_the_time_limit_is_survived(submit: Submitter, recipe: Path, curve: Job) -> None:
    # Slurm looks twice a minute, so the signal comes up to 60 s early.
    job = submit("job", "--config", recipe, *LONG, options=("-N2", "--time=2", "--signal=USR1@30"))
    follows(job, curve)


def test_a_run_that_is_stopped_too_often_ends(submit: Submitter, recipe: Path) -> None:
    job = submit("job", "--config", recipe, *LONG, MAX_RESTARTS="0")
    job.wait_for_step(3)
    job.cluster.run("scancel", "--signal=TERM", job.id)
    assert job.wait() == "FAILED"
    assert job.exit_code() == 85
    assert "error: stopped again after 0 restarts (MAX_RESTARTS): not requeued" in job.text()


def test_the_files_save_and_stop(submit: Submitter, recipe: Path) -> None:
    job = submit("job", "--config", recipe, *LONG)
    job.wait_for_step(3)
    (job.run / "SAVE").touch()
    until(lambda: not (job.run / "SAVE").exists(), "SAVE was seen to")
    first = sorted(int(path.name.partition("-")[2]) for path in job.run.glob("checkpoint-*"))
    assert any(step % 10 for step in first)  # beside those of --save_steps
    (job.run / "STOP").touch()
    assert job.wait() == "FAILED"
    assert job.exit_code() == 86
    last = max(int(path.name.partition("-")[2]) for path in job.run.glob("checkpoint-*"))
    assert losses(job.metrics())[-1][0] == last
    again = submit("job", "--config", recipe, *LONG)
    assert again.wait() == "FAILED"
    assert again.exit_code() == 2
    assert "the file STOP there keeps the run from going on: remove it" in again.text()
