"""A chain as jobs: align, convert, fine-tune on two nodes, convert, assess; the same results as two ranks that
deepspeed starts on one machine."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file

from tests.slurm.cluster import ROOT, Cluster
from tests.slurm.jobs import PATIENCE, losses, until

NAMES = ["align", "aligned", "tuned", "model", "judged"]
ON_TWO_NODES = "-N2 --gpus-per-node=0"


def submit(
    cluster: Cluster, site: dict[str, str], recipe: Path, resources: str = ON_TWO_NODES
) -> subprocess.CompletedProcess[str]:
    """tools/chain.py RECIPE --slurm=RESOURCES"""
    return cluster.run(sys.executable, "tools/chain.py", recipe, f"--slurm={resources}", variables=site)


def finish(cluster: Cluster, text: str) -> None:
    """Wait until no job of a chain is left."""
    ids = [line.split("job ")[1].partition(" ")[0].rstrip(",") for line in text.splitlines()]
    until(
        lambda: not cluster.run("squeue", "-h", "-j", ",".join(ids)).stdout.strip(), f"the end of {ids}", 2 * PATIENCE
    )


@pytest.fixture
def stages(recipe: Path, tmp_path: Path) -> Path:
    """Align, fine-tune from there, convert, assess."""
    common = yaml.safe_load(recipe.read_text()) | {"max_steps": 6, "save_steps": 3}
    pools = ("harmful_data", "harmless_data")
    align = {name: value for name, value in common.items() if name not in pools} | {"method": "sft"}
    tuned = common | {"model_name_or_path": "{aligned}"}
    judged = {"model_name_or_path": "{model}", "suites": "policy", "max_new_tokens": 4}
    content = {
        "name": "little", "output_dir": str(tmp_path / "out"),
        "stages": [
            {"name": "align", "run": "train", "ranks": 2, "with": align},
            {"name": "aligned", "run": "convert", "with": {"checkpoint": "{align}", "dtype": "fp32"}},
            {"name": "tuned", "run": "train", "ranks": 2, "with": tuned},
            {"name": "model", "run": "convert", "with": {"checkpoint": "{tuned}", "dtype": "fp32"}},
            {"name": "judged", "run": "assess", "with": judged},
        ],
    }  # fmt: skip
    path = tmp_path / "chain.yaml"
    path.write_text(yaml.safe_dump(content))
    return path


def results(folder: Path) -> tuple[Any, Any]:
    """The fine-tuning's curve, and what the judges say."""
    metrics = [json.loads(line) for line in (folder / "tuned/metrics.jsonl").read_text().splitlines()]
    return losses(metrics), json.loads((folder / "judged/results.json").read_text())["suites"]


def test_a_chain_of_jobs_equals_ranks_that_deepspeed_starts(
    cluster: Cluster, site: dict[str, str], stages: Path, tmp_path: Path
) -> None:
    out, alone = tmp_path / "out", tmp_path / "alone"
    with (tmp_path / "alone.log").open("wb") as log:
        words = [sys.executable, "tools/chain.py", stages, "--output_dir", alone]
        runner = subprocess.Popen(words, cwd=ROOT, env=os.environ | site, stdout=log, stderr=log)
    said = submit(cluster, site | {"DOCTOR_SECONDS": "200"}, stages)
    assert said.returncode == 0, said.stderr
    assert [line.partition(":")[0] for line in said.stdout.splitlines()] == NAMES
    align = said.stdout.split("job ")[1].split(",")[0]
    assert f"aligned: job {int(align) + 1} after {align}, log in {out}/logs/aligned.log" in said.stdout
    finish(cluster, said.stdout)
    records = {path.stem: json.loads(path.read_text()) for path in (out / ".chain").glob("*.json")}
    text = (out / "logs/tuned.log").read_text()
    assert sorted(records) == sorted(NAMES), text
    assert all(record["finished"] for record in records.values()), text
    again = submit(cluster, site, stages)  # nothing is left to do
    assert again.stdout.splitlines() == [f"{name}: finished before" for name in NAMES], again.stderr

    assert "2 ranks on 2 nodes are here" in text  # the preflight
    assert "step 6/6  loss" in text  # what tail -f shows
    run = json.loads((out / "tuned/run.json").read_text())
    assert run["world_size"] == 2
    assert run["slurm"]["SLURM_JOB_NODELIST"] == "n[1-2]"
    command = "sbatch --job-name=out-tuned --partition=low --nodes=2 --gpus-per-node=0"
    assert run["slurm"]["resume"].startswith(f"cd {ROOT} && {command}")
    assert run["slurm"]["resume"].endswith(f"/slurm/stage.sh {stages} {out} tuned")

    assert runner.wait(2 * PATIENCE) == 0, (tmp_path / "alone.log").read_text()
    assert results(out) == results(alone)
    weights, others = (load_file(folder / "model/model.safetensors") for folder in (out, alone))
    assert weights.keys() == others.keys()
    assert all(torch.equal(weights[name], others[name]) for name in weights)


def test_a_stage_that_fails_takes_those_behind_it_away(
    cluster: Cluster, site: dict[str, str], stages: Path, tmp_path: Path
) -> None:
    content = yaml.safe_load(stages.read_text())
    content["stages"][0]["with"]["train_data"] = str(tmp_path / "none.jsonl")
    stages.write_text(yaml.safe_dump(content))
    said = submit(cluster, site, stages, "-N1 --gpus-per-node=0")
    assert said.returncode == 0, said.stderr
    finish(cluster, said.stdout)
    assert "none.jsonl: no such file" in (tmp_path / "out/logs/align.log").read_text()
    assert not (tmp_path / "out/aligned").exists()


def test_an_unknown_partition_leaves_no_job(cluster: Cluster, site: dict[str, str], stages: Path) -> None:
    said = submit(cluster, site, stages, "--partition=nowhere")
    assert said.returncode == 2
    assert "error: --slurm --partition=nowhere: stage align was not accepted: " in said.stderr
    assert not cluster.run("squeue", "-h").stdout.strip()
