"""The scripts themselves: shellcheck, what Slurm says to their headers, and what a bad site gets to hear."""

from __future__ import annotations

import shutil
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from tests.slurm.cluster import ROOT, Cluster
from tests.slurm.jobs import Submitter

SCRIPTS = sorted((ROOT / "slurm").glob("*.sh"))
TEMPLATES = [path for path in SCRIPTS if "#SBATCH" in path.read_text()]


@pytest.mark.skipif(
    shutil.which("shellcheck") is None, reason="shellcheck is not installed: make test-slurm installs it"
)
def test_shellcheck_finds_nothing() -> None:
    done = subprocess.run(
        ["shellcheck", "-x", *(str(path.relative_to(ROOT)) for path in SCRIPTS)], cwd=ROOT, text=True,
        capture_output=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize("template", TEMPLATES, ids=lambda path: path.stem)
def test_a_big_cluster_accepts_the_header(cluster: Cluster, template: Path) -> None:
    done = cluster.run("sbatch", "--test-only", "--partition=big", template.relative_to(ROOT))
    assert done.returncode == 0, done.stderr
    assert "to start at" in done.stderr


@pytest.mark.parametrize("template", TEMPLATES, ids=lambda path: path.stem)
def test_the_header_asks_for_nothing_that_the_command_line_cannot_take_back(template: Path) -> None:
    asked = {line.split()[1].partition("=")[0] for line in template.read_text().splitlines() if line[:7] == "#SBATCH"}
    assert {"--nodes", "--gpus-per-node", "--exclusive", "--time"} <= asked
    assert not asked & {"--ntasks", "--ntasks-per-node", "--gres", "--gpus", "--mem", "--cpus-per-task", "--partition"}


def test_an_unknown_partition_is_refused_by_sbatch(submit: Submitter, recipe: Path) -> None:
    done = submit.sbatch("nowhere", "--config", recipe, options=("-N2", "--partition=nowhere"))
    assert done.returncode != 0
    assert "invalid partition specified: nowhere" in done.stderr


def test_a_missing_environment_is_named_before_anything_starts(submit: Submitter, recipe: Path) -> None:
    job = submit("job", "--config", recipe, PYTHON="/nowhere/bin/python")
    assert job.wait() == "FAILED"
    assert job.exit_code() == 2
    assert job.text().startswith("error: PYTHON=/nowhere/bin/python of slurm/site.sh is no program on")
    assert len(job.text().splitlines()) == 1
    assert not job.run.exists()


def test_a_job_from_another_folder_says_where_to_submit(cluster: Cluster, tmp_path: Path) -> None:
    done = cluster.run(
        "sbatch", "--wait", "--parsable", "-N2", "--gpus-per-node=0", f"--output={tmp_path}/log",
        ROOT / "slurm/surgery_70b.sh", cwd=tmp_path,
    )  # fmt: skip
    assert done.returncode == 2
    assert "error: submit from the root of the repository" in (tmp_path / "log").read_text()


def test_a_port_that_is_taken_is_named_before_weights_load(submit: Submitter, recipe: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        job = submit("job", "--config", recipe, DOCTOR_SECONDS="15", MASTER_PORT=port)
        assert job.wait() == "FAILED"
    assert job.exit_code() == 2
    assert f"port {port} cannot be opened" in job.text()
    assert "error: the nodes are not ready (above); leave one out with sbatch --exclude=NODE" in job.text()
    assert not (job.run / "run.json").exists()


def test_a_folder_that_is_not_shared_is_named_before_weights_load(
    submit: Submitter, recipe: Path, tmp_path: Path
) -> None:
    # On n2 the program works in another folder, as where a disk is not mounted.
    elsewhere = tmp_path / "elsewhere"
    (elsewhere / "runs").mkdir(parents=True)
    python = tmp_path / "python"
    python.write_text(
        "#!/bin/bash\nscript=$PWD/$1; shift\n"
        f"[[ $SLURMD_NODENAME == n2 ]] && cd {elsewhere}\n"
        f'exec {sys.executable} "$script" "$@"\n'
    )
    python.chmod(0o755)
    done = submit.sbatch(
        "job", "--config", recipe, "--output_dir", "runs/not-shared", options=("-N2", "--wait"),
        DOCTOR_SECONDS="200", PYTHON=str(python),
    )  # fmt: skip
    text = (submit.folder / f"job-{done.stdout.strip()}.log").read_text()
    shutil.rmtree(ROOT / "runs/not-shared")
    assert done.returncode == 2, text
    assert "is another folder here than on the node of rank 0" in text
