"""A sweep: an array of runs, then one job that judges all of them."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.slurm.cluster import ROOT, Cluster
from tests.slurm.jobs import until


@pytest.fixture
def name() -> Iterator[str]:
    """The job's, below which its runs lie in the repository's own folder of runs."""
    name = f"test-sweep-{os.getpid()}"
    yield name
    shutil.rmtree(ROOT / "runs" / name, ignore_errors=True)


def test_a_sweep_trains_every_pair_and_judges_them_in_one_table(
    cluster: Cluster, site: dict[str, str], name: str, tiny_model_dir: Path, tmp_path: Path
) -> None:
    variables = {
        "METHODS": "sft surgery", "RATIOS": "0.5", "HARMFUL_DATA": "policy:harmful[:8]",
        "HARMLESS_DATA": "policy:harmless[:8]", "ASSESS": "--max_new_tokens 4",
    }  # fmt: skip
    done = cluster.run(
        "sbatch", "--parsable", "--gpus-per-node=0", "--array=0-1", f"--job-name={name}", "--chdir", ROOT,
        f"--output={tmp_path}/%a.log", "slurm/sweep.sh", "--model_name_or_path", tiny_model_dir, "--train_data",
        "policy:user[:8]", "--attack_data", "policy:attack", "--sample_num", "8", "--num_train_epochs", "1",
        "--cache_dir", tmp_path / "cache", variables=site | variables,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    until(lambda: not cluster.run("squeue", "-h", "-o", "%j").stdout.strip(), "the end of the sweep")
    folder = ROOT / "runs" / name
    logs = "".join(path.read_text() for path in [*tmp_path.glob("*.log"), *folder.glob("*.log")])
    for method in ("sft", "surgery"):
        run = json.loads((folder / f"{method}-0.5/run.json").read_text())
        assert (run["method"], run["arguments"]["poison_ratio"], run["attacked"]) == (method, 0.5, True)
        assert run["slurm"]["SLURM_ARRAY_JOB_ID"] == done.stdout.strip()
        assert f" --array=0-1 {ROOT}/slurm/sweep.sh --model_name_or_path" in run["slurm"]["resume"]
        assert (folder / f"{method}-0.5/assess/results.json").exists(), logs
        assert not (folder / f"{method}-0.5/model").exists()  # an attacked model, wanted no longer
    (table,) = folder.glob("compare-*/table.md")
    assert "| sft, 50 % " in table.read_text()
    assert "| surgery, 50 % " in table.read_text()
