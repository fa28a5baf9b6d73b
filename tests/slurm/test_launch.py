"""Two nodes, one rank each, through the user's entry point: the same run as one that deepspeed starts."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import torch
from safetensors.torch import load_file

from tests import doors
from tests.slurm.jobs import ROOT, Submitter, losses


def test_srun_on_two_nodes_equals_deepspeed_on_two_ranks(
    submit: Submitter, recipe: Path, tmp_path: Path, site: dict[str, str]
) -> None:
    job = submit("job", "--config", recipe, DOCTOR_SECONDS="120")
    assert job.wait() == "COMPLETED", job.text()
    assert "2 ranks on 2 nodes are here" in job.text()  # the preflight
    assert "step 40/40  loss" in job.text()  # what tail -f shows
    done = subprocess.run(
        [
            Path(sys.executable).with_name("deepspeed"), "--num_gpus", "2", "pipeline/train.py", "--config", recipe,
            "--output_dir", tmp_path / "deepspeed",
        ],
        cwd=ROOT, env=os.environ | site, text=True, capture_output=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    other = [json.loads(line) for line in (tmp_path / "deepspeed/metrics.jsonl").read_text().splitlines()]
    assert losses(job.metrics()) == losses(other)
    weights = []
    for run in (job.run, tmp_path / "deepspeed"):
        converted = tmp_path / f"{run.name}-model"
        done = doors.run("tools/zero_to_hf.py", run, converted, "--dtype", "fp32")
        assert done.returncode == 0, done.stderr
        weights.append(load_file(converted / "model.safetensors"))
    assert weights[0].keys() == weights[1].keys()
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])

    record = json.loads((job.run / "run.json").read_text())
    assert record["world_size"] == 2
    slurm = record["slurm"]
    assert (slurm["SLURM_JOB_ID"], slurm["SLURM_JOB_NODELIST"]) == (job.id, "n[1-2]")
    assert slurm["resume"].startswith(
        f"cd {ROOT} && sbatch --job-name=job --partition=low --nodes=2 --gpus-per-node=0"
    )
    assert slurm["resume"].endswith(f"--config {recipe}")
