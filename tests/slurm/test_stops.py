"""Signals, preemption, the time limit and the switch files: saved, requeued, and continued to the very same curve."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.ranks import free_port
from tests.slurm.cluster import ROOT, Cluster
from tests.slurm.jobs import PATIENCE, Curve, Job, Submitter, losses, submitting, until

STEPS = ("--max_steps", "120")


@dataclass
class Undisturbed:
    """The same run on two ranks without Slurm, in the background."""

    process: subprocess.Popen[bytes]
    folder: Path

    def curve(self) -> Curve:
        assert self.process.wait(PATIENCE) == 0, (self.folder / "log").read_text()
        return losses([json.loads(line) for line in (self.folder / "run/metrics.jsonl").read_text().splitlines()])


@pytest.fixture(scope="module", autouse=True)
def undisturbed(
    cluster: Cluster, recipe: Path, site: dict[str, str], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Undisturbed]:
    """Started by deepspeed, and by nobody ended before its time."""
    folder = tmp_path_factory.mktemp("undisturbed")
    words = ["--num_gpus", "2", "--master_port", str(free_port()), "pipeline/train.py", "--config", recipe, *STEPS]
    with (folder / "log").open("wb") as log:
        process = subprocess.Popen(
            [Path(sys.executable).with_name("deepspeed"), *words, "--output_dir", folder / "run"], cwd=ROOT,
            env=os.environ | site, stdout=log, stderr=log,
        )  # fmt: skip
    yield Undisturbed(process, folder)
    process.terminate()
    process.wait()


@pytest.fixture(scope="module", autouse=True)
def limited(
    cluster: Cluster, recipe: Path, site: dict[str, str], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Job]:
    """A job that runs into its time limit, beside the other tests: Slurm looks twice a minute, so that the signal
    comes 30 to 60 s before the limit."""
    options = ("-N2", "--partition=aside", "--time=2", "--signal=USR1@30")
    with submitting(cluster, tmp_path_factory.mktemp("limited"), site) as submit:
        yield submit("job", "--config", recipe, *STEPS, options=options, faults="slow:1")


def requeued(job: Job, restart: int = 0) -> int:
    """Wait until the job's start number `restart` has ended; the step it saved."""
    path = job.run / f"logs/{job.id}-{restart}/requeue.json"
    until(lambda: job.restarts() > restart and path.exists(), f"a requeue of job {job.id}:\n{job.text()}")
    marker = json.loads(path.read_text())
    assert marker["code"] == 85
    return int(str(marker["reason"]).rpartition("checkpoint-")[2])


def preempt(job: Job, folder: Path) -> None:
    """A job that goes before this one."""
    urgent = folder / "urgent.sh"
    urgent.write_text("#!/bin/sh\nsleep 1\n")
    done = job.cluster.run("sbatch", "-N2", "--exclusive", "--partition=high", f"--output={folder}/urgent.log", urgent)
    assert done.returncode == 0, done.stderr


def test_usr1_and_preemption_save_the_step_and_the_curve_stays_the_same(
    submit: Submitter, recipe: Path, undisturbed: Undisturbed, tmp_path: Path
) -> None:
    job = submit("job", "--config", recipe, *STEPS, faults="slow:0.3 slow:0.3")
    job.wait_for_step(3)
    job.cluster.run("scancel", "--signal=USR1", job.id)
    saved = requeued(job)
    assert f"stopped by SIGUSR1: checkpoint-{saved}" in job.text()
    assert losses(job.metrics())[-1][0] == saved
    job.wait_for_step(saved + 2)
    preempt(job, tmp_path)  # with a grace time, in which the script requeues
    again = requeued(job, 1)
    assert saved + 2 <= again < 120
    assert job.wait() == "COMPLETED", job.text()
    assert job.restarts() == 2
    assert job.text().count("requeued: ") == 2
    assert "the scheduler has requeued" not in job.text()
    assert json.loads((job.run / "run.json").read_text())["resumed_from"].endswith(f"checkpoint-{again}")
    assert losses(job.metrics()) == undisturbed.curve()


def test_where_the_scheduler_requeues_the_script_does_not_and_the_restarts_are_limited(
    submit: Submitter, recipe: Path, undisturbed: Undisturbed, tmp_path: Path
) -> None:
    options = ("-N2", "--partition=nograce")
    job = submit("job", "--config", recipe, *STEPS, options=options, faults="slow:0.3 slow:0.3", MAX_RESTARTS="1")
    job.wait_for_step(3)
    preempt(job, tmp_path)
    saved = requeued(job)
    job.wait_for_step(saved + 2)
    assert job.restarts() == 1
    assert "the scheduler has requeued or ended this job itself: " in job.text()
    assert "requeued: " not in job.text()
    job.cluster.run("scancel", "--signal=TERM", job.id)
    assert job.wait() == "FAILED"
    assert job.exit_code() == 85
    assert "error: stopped again after 1 restarts (MAX_RESTARTS): not requeued" in job.text()
    found = losses(job.metrics())
    assert found == undisturbed.curve()[: len(found)]


def test_the_files_save_and_stop(submit: Submitter, recipe: Path) -> None:
    job = submit("job", "--config", recipe, *STEPS, faults="slow:0.3")
    job.wait_for_step(3)
    (job.run / "SAVE").touch()
    until(lambda: not (job.run / "SAVE").exists(), "SAVE was seen to")
    first = sorted(int(path.name.partition("-")[2]) for path in job.run.glob("checkpoint-*"))
    assert any(step % 10 for step in first)  # beside those of --save_steps
    job.wait_for_step(first[-1] + 2)  # it goes on
    (job.run / "STOP").touch()
    assert job.wait() == "FAILED"
    assert job.exit_code() == 86
    last = max(int(path.name.partition("-")[2]) for path in job.run.glob("checkpoint-*"))
    assert losses(job.metrics())[-1][0] == last
    again = submit("job", "--config", recipe, *STEPS)
    assert again.wait() == "FAILED"
    assert again.exit_code() == 2
    assert "the file STOP there keeps the run from going on: remove it" in again.text()


def test_the_time_limit_is_survived(limited: Job, undisturbed: Undisturbed) -> None:
    saved = requeued(limited)
    assert f"stopped by SIGUSR1: checkpoint-{saved}" in limited.text()
    assert limited.wait() == "COMPLETED", limited.text()
    assert losses(limited.metrics()) == undisturbed.curve()
