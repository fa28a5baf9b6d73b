"""A rank that does something else than the others, or nothing, is named, and the job goes on without a person."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

import pytest

from tests.slurm.jobs import ROOT, Job, Submitter, until


def faulty(submit: Submitter, recipe: Path, tmp_path: Path, fault: str, *words: str) -> tuple[Job, float]:
    """A job with a fault in its first start, and the seconds from its step 4 to the end of that start."""
    python = tmp_path / "python"
    python.write_text(f'#!/bin/bash\nexec {sys.executable} {ROOT}/tests/slurm/faulty.py "$@"\n')
    python.chmod(0o755)
    job = submit("job", "--config", recipe, *words, PYTHON=str(python), FAULT=fault)
    job.wait_for_step(3)
    began = time.monotonic()
    until(lambda: "requeued: " in job.text() or job.state() == "FAILED", f"the watchdog's verdict:\n{job.text()}")
    return job, time.monotonic() - began


def test_a_rank_that_skips_a_forward_pass_is_named_within_a_minute(
    submit: Submitter, recipe: Path, tmp_path: Path
) -> None:
    job, seconds = faulty(submit, recipe, tmp_path, "skip:1:3")
    assert "error: watchdog: ranks diverge: rank 1 (n2) made an optimizer step, where" in job.text()
    assert "rank 0 (n1): training at step 4, 4 forward and" in job.text()
    assert "rank 1 (n2): training at step 4, 3 forward and 3 backward passes" in job.text()
    assert seconds < 60
    for rank in (0, 1):  # every rank's stacks are in its own log
        assert "stacks of all threads" in (job.run / f"logs/{job.id}-0/rank_{rank}.log").read_text()
    assert json.loads((job.run / f"logs/{job.id}-0/requeue.json").read_text())["code"] == 87
    assert job.wait() == "COMPLETED"  # the second start has no fault
    assert job.metrics()[-1]["step"] == 40


def test_a_rank_that_sleeps_is_named_as_the_one_that_all_wait_for(
    submit: Submitter, recipe: Path, tmp_path: Path
) -> None:
    job, _ = faulty(submit, recipe, tmp_path, "sleep:1:3", "--watchdog_minutes", "0.2")
    assert "no rank has moved for 0.2 minutes: 1 of 2 ranks wait for rank 1 (n2), training" in job.text()
    assert "tests/slurm/faulty.py" in (job.run / f"logs/{job.id}-0/rank_1.log").read_text()
    assert job.wait() == "COMPLETED"


@pytest.mark.usefixtures("cluster")
def test_the_heartbeats_of_all_ranks_lie_in_the_run_folder(submit: Submitter, recipe: Path) -> None:
    job = submit("job", "--config", recipe, "--max_steps", "400")
    until(lambda: (job.run / "heartbeat.json").exists(), "a heartbeat")
    until(
        lambda: [b["step"] > 0 for b in json.loads((job.run / "heartbeat.json").read_text())] == [True, True], "steps"
    )
    assert [beat["node"] for beat in json.loads((job.run / "heartbeat.json").read_text())] == ["n1", "n2"]
    job.cancel()
