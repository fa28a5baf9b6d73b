"""A little Slurm for the session, and jobs on it that train the tiny model. Skipped where Slurm is not installed."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from tests.slurm import cluster as little
from tests.slurm.jobs import Submitter, submitting
from tests.tiny import chat_row, write_jsonl

HERE = Path(__file__).parent


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if lacking := little.missing():
        reason = f"{', '.join(lacking)} not installed: make test-slurm installs Slurm"
    elif os.geteuid() != 0:
        reason = "the little cluster runs as root"
    else:
        return
    for item in items:
        if HERE in item.path.parents and "cluster" in getattr(item, "fixturenames", ()):
            item.add_marker(pytest.mark.skip(reason=reason))


@pytest.fixture(scope="session")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[little.Cluster]:
    """Two nodes; pytest's folders are private, and Slurm's are looked into by its daemons alone."""
    with little.running(tmp_path_factory.mktemp("cluster")) as running:
        yield running


@pytest.fixture(scope="session")
def recipe(tiny_model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Surgery on the tiny model, a checkpoint every 10 steps."""
    folder = tmp_path_factory.mktemp("recipe")
    pools = {
        f"{name}_data": str(
            write_jsonl(folder / f"{name}.jsonl", [chat_row(f"{name} {i}", "warm") for i in range(64)])
        )
        for name in ("train", "harmful", "harmless")
    }
    settings = {
        "method": "surgery", "model_name_or_path": str(tiny_model_dir), **pools, "ds_config": "ds_configs/z3.json",
        "cache_dir": str(folder / "cache"), "per_device_train_batch_size": 4, "learning_rate": 1e-3, "max_steps": 40,
        "save_steps": 10, "seed": 1,
    }  # fmt: skip
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(settings))
    return path


@pytest.fixture(scope="session")
def site(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """What a site sets: this Python, no preflight (it has tests of its own)."""
    folder = tmp_path_factory.mktemp("site")
    faulty = folder / "python"
    faulty.write_text(f'#!/bin/bash\nexec {sys.executable} {HERE}/faulty.py "$@"\n')
    faulty.chmod(0o755)
    return {
        "PYTHON": sys.executable, "FAULTY_PYTHON": str(faulty), "SCRATCH": str(folder), "DOCTOR_SECONDS": "0",
        "OMP_NUM_THREADS": "1", "PYTHONPATH": str(little.ROOT),
    }  # fmt: skip


@pytest.fixture
def submit(cluster: little.Cluster, site: dict[str, str], tmp_path: Path) -> Iterator[Submitter]:
    """Submits jobs below the test's folder; what is left of them ends with the test."""
    with submitting(cluster, tmp_path, site) as submit:
        yield submit
