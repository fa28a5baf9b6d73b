"""A rank that does something else than the others, or nothing, is named, and the job goes on without a person."""

from __future__ import annotations

import json
import time
from pathlib import Path

from tests.slurm.jobs import Job, Submitter, until


def ends(job: Job, start: int) -> str:
    """Wait until a start of the job has ended in a requeue; all that was said until then."""
    until(lambda: job.text().count("requeued: ") > start or job.state() == "FAILED", f"a verdict:\n{job.text()}")
    assert json.loads((job.run / f"logs/{job.id}-{start}/requeue.json").read_text())["code"] == 87
    for rank in (0, 1):  # every rank's stacks are in its own log
        log = (job.run / f"logs/{job.id}-{start}/rank_{rank}.log").read_text()
        assert "stacks of all threads" in log
        assert "pipeline/training/run.py" in log
    return job.text()


def test_a_rank_that_skips_a_pass_and_a_rank_that_sleeps_are_named(submit: Submitter, recipe: Path) -> None:
    words = ("--max_steps", "12", "--watchdog_minutes", "0.5")
    job = submit("job", "--config", recipe, *words, faults="skip:1:3 sleep:1:3")
    job.wait_for_step(3)
    began = time.monotonic()
    text = ends(job, 0)
    assert time.monotonic() - began < 60
    assert "error: watchdog: ranks diverge: rank 1 (n2) made an optimizer step, where" in text
    assert "rank 0 (n1): training at step 4, 4 forward and" in text
    assert "rank 1 (n2): training at step 4, 3 forward and 3 backward passes" in text

    text = ends(job, 1)
    assert "no rank has moved for 0.5 minutes: 1 of 2 ranks wait for rank 1 (n2), training" in text
    assert "tests/slurm/faulty.py" in (job.run / f"logs/{job.id}-1/rank_1.log").read_text()

    assert job.wait() == "COMPLETED"  # the third start has no fault
    assert job.metrics()[-1]["step"] == 12
    beats = json.loads((job.run / "heartbeat.json").read_text())
    assert [(beat["rank"], beat["node"]) for beat in beats] == [(0, "n1"), (1, "n2")]
