"""A chain as jobs: align, fine-tune on two nodes, convert, assess; the same results as the runner on one machine."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.slurm.cluster import Cluster
from tests.slurm.jobs import ROOT, losses, until

Chain = subprocess.CompletedProcess[str]


def chain(cluster: Cluster, site: dict[str, str], recipe: Path, *words: str | Path) -> Chain:
    return subprocess.run(
        [sys.executable, "tools/chain.py", recipe, *words], cwd=ROOT, env=cluster.environment | site, text=True,
        capture_output=True, timeout=300, check=False,
    )  # fmt: skip


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


def results(folder: Path) -> tuple[list[tuple[int, float, float]], Any]:
    metrics = [json.loads(line) for line in (folder / "tuned/metrics.jsonl").read_text().splitlines()]
    return losses(metrics), json.loads((folder / "judged/results.json").read_text())["suites"]


def test_a_chain_of_jobs_equals_the_runner_on_one_machine(
    cluster: Cluster, site: dict[str, str], stages: Path, tmp_path: Path
) -> None:
    said = chain(cluster, site, stages, "--slurm", "-N2 --gpus-per-node=0")
    assert said.returncode == 0, said.stderr
    assert len(said.stdout.splitlines()) == 5
    align = said.stdout.split("job ")[1].split(",")[0]
    assert f"aligned: job {int(align) + 1} after {align}, log in {tmp_path}/out/logs/aligned.log" in said.stdout
    until(lambda: not cluster.run("squeue", "-h").stdout.strip(), "the end of all jobs", 400)
    finished = {path.stem: json.loads(path.read_text()) for path in (tmp_path / "out/.chain").glob("*.json")}
    assert all(record["finished"] for record in finished.values()), (tmp_path / "out/logs/tuned.log").read_text()
    assert len(finished) == 5
    assert json.loads((tmp_path / "out/tuned/run.json").read_text())["slurm"]["SLURM_JOB_NUM_NODES"] == "2"

    again = chain(cluster, site, stages, "--slurm", "-N2 --gpus-per-node=0")  # nothing is left to do
    assert again.stdout.splitlines() == [f"{name}: finished before" for name in finished_order()]

    alone = chain(cluster, site | {"PATH": os.environ["PATH"]}, stages, "--output_dir", tmp_path / "alone")
    assert alone.returncode == 0, alone.stdout + alone.stderr
    assert results(tmp_path / "out") == results(tmp_path / "alone")


def finished_order() -> list[str]:
    return ["align", "aligned", "tuned", "model", "judged"]


def test_a_stage_that_fails_takes_those_behind_it_away(
    cluster: Cluster, site: dict[str, str], stages: Path, tmp_path: Path
) -> None:
    content = yaml.safe_load(stages.read_text())
    content["stages"][0]["with"]["train_data"] = str(tmp_path / "none.jsonl")
    stages.write_text(yaml.safe_dump(content))
    said = chain(cluster, site, stages, "--slurm", "-N2 --gpus-per-node=0")
    assert said.returncode == 0, said.stderr
    until(lambda: not cluster.run("squeue", "-h").stdout.strip(), "the end of all jobs")
    assert "none.jsonl: no such file" in (tmp_path / "out/logs/align.log").read_text()
    assert not (tmp_path / "out/aligned").exists()


def test_an_unknown_partition_leaves_no_job(cluster: Cluster, site: dict[str, str], stages: Path) -> None:
    said = chain(cluster, site, stages, "--slurm", "--partition=nowhere")
    assert said.returncode == 2
    assert "error: --slurm --partition=nowhere: stage align was not accepted: " in said.stderr
    assert not cluster.run("squeue", "-h").stdout.strip()
