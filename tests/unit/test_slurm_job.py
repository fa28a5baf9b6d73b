"""Ranks out of Slurm's variables, and the marker that asks for a requeue."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from pipeline.slurm_job import STOPPED, ask_for_requeue, rank_variables, record

TASK = {
    "SLURM_JOB_ID": "61234", "SLURM_PROCID": "11", "SLURM_LOCALID": "3", "SLURM_STEP_NUM_TASKS": "16",
    "SLURM_STEP_NODELIST": "gpu[007-008]",
}  # fmt: skip


def test_a_task_of_srun_knows_its_rank_and_where_rank_0_is() -> None:
    assert rank_variables(TASK) == {
        "RANK": "11", "LOCAL_RANK": "3", "WORLD_SIZE": "16", "MASTER_ADDR": "gpu007", "MASTER_PORT": "11234",
    }  # fmt: skip


def test_what_the_job_exported_is_kept() -> None:
    found = rank_variables(TASK | {"MASTER_ADDR": "10.0.0.7", "MASTER_PORT": "4242"})
    assert (found["MASTER_ADDR"], found["MASTER_PORT"]) == ("10.0.0.7", "4242")


@pytest.mark.parametrize(
    "environment",
    [
        TASK | {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "2"},  # deepspeed inside srun --pty bash
        {name: value for name, value in TASK.items() if "STEP" not in name},  # a batch script is no rank
        {},
    ],
)
def test_elsewhere_nothing_is_taken_from_slurm(environment: dict[str, str]) -> None:
    assert rank_variables(environment) == {}


def test_the_record_holds_the_job_and_nothing_secret() -> None:
    kept = record(TASK | {"SLURM_JWT": "secret", "RESUME_COMMAND": "sbatch x"})
    assert kept["SLURM_JOB_ID"] == "61234"
    assert kept["resume"] == "sbatch x"
    assert "SLURM_JWT" not in kept
    assert record({"HOME": "/root"}) == {}


def test_the_marker_is_left_only_where_somebody_looks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("REQUEUE_MARKER", raising=False)
    ask_for_requeue(STOPPED, "why")
    monkeypatch.setenv("REQUEUE_MARKER", str(tmp_path / "requeue.json"))
    ask_for_requeue(STOPPED, "why")
    assert json.loads((tmp_path / "requeue.json").read_text()) == {"code": 85, "reason": "why"}
    assert list(tmp_path.iterdir()) == [tmp_path / "requeue.json"]
