"""Checkpoints that DeepSpeed wrote and an adapter, made once for all tests of this folder that read them."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from filelock import FileLock

from pipeline.checkpoints.lora import ADAPTER_CONFIG
from tests.adapters import save_adapter
from tests.ranks import run_ranks


@pytest.fixture(scope="session")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder NAME/checkpoint-2 for each case of the worker, of two ranks, and the models they started from. Read
    only."""
    base = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        base = base.parent  # which all workers of this run share: the first one makes them for all
    out, made = base / "zero", base / "zero.made"
    with FileLock(base / "zero.lock"):
        if not made.exists():
            shutil.rmtree(out, ignore_errors=True)  # of a worker that failed at it
            out.mkdir()
            run_ranks(Path(__file__).with_name("zero_checkpoint_worker.py"), str(out), ranks=2)
            made.touch()
    return out


@pytest.fixture(scope="session")
def adapter(tiny_model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A plain adapter of the tiny Llama. Read only."""
    return save_adapter(tiny_model_dir, tmp_path_factory.mktemp("adapters") / "plain")


@pytest.fixture
def edited(adapter: Path, tmp_path: Path) -> Callable[..., Path]:
    """A copy of the plain adapter with other settings."""

    def copy(**changes: Any) -> Path:
        folder = Path(shutil.copytree(adapter, tmp_path / "edited"))
        config = json.loads((folder / ADAPTER_CONFIG).read_text()) | changes
        (folder / ADAPTER_CONFIG).write_text(json.dumps(config))
        return folder

    return copy
