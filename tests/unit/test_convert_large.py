"""What shows only where a conversion takes a while: its memory, a kill in the middle of it, two at once."""

from __future__ import annotations

import itertools
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.ranks import ROOT
from tests.unit import convert_kill_worker
from tests.zero_checkpoints import deepspeed_weights
from tools.bench.synthetic_zero3 import llama_config, shapes_of, write_checkpoint

GB = 10**9
SMALL, LARGE = 0.01, 0.1  # billion parameters: 0.04 and 0.4 GB of shards


@pytest.fixture(scope="module")
def synthetic(tmp_path_factory: pytest.TempPathFactory) -> dict[float, Path]:
    """Checkpoints of three ranks by size."""
    folder = tmp_path_factory.mktemp("synthetic")
    return {size: write_checkpoint(folder / str(size), llama_config(size * 1e9), 3) for size in (SMALL, LARGE)}


def peak_bytes(checkpoint: Path, out: Path) -> int:
    """Of a conversion in a process of its own, mapped file pages included."""
    done = subprocess.run(
        [sys.executable, "tools/bench/one_conversion.py", "ours", checkpoint, out, "fp32"],
        cwd=ROOT, capture_output=True, text=True, check=False, timeout=120,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return int(json.loads(done.stdout.splitlines()[-1])["peak_bytes"])


def test_memory_does_not_grow_with_the_model(synthetic: dict[float, Path], tmp_path: Path) -> None:
    peaks = {size: peak_bytes(checkpoint, tmp_path / str(size)) for size, checkpoint in synthetic.items()}
    largest = max(shape.numel() for shape in shapes_of(llama_config(LARGE * 1e9)).values())
    assert peaks[LARGE] < GB + 4 * largest
    # 0.36 GB more of shards; what may grow is what the allocator keeps, and a header.
    assert peaks[LARGE] - peaks[SMALL] < 0.06 * GB
    written, expected = load_file(tmp_path / str(LARGE) / "model.safetensors"), deepspeed_weights(synthetic[LARGE])
    assert written.keys() == expected.keys()
    assert all(torch.equal(written[name], expected[name]) for name in expected)


def test_kill_at_random_points_and_continue(synthetic: dict[float, Path], tmp_path: Path) -> None:
    out, straight = tmp_path / "out", tmp_path / "straight"
    done = subprocess.run(
        [sys.executable, Path(convert_kill_worker.__file__), synthetic[LARGE], out],
        cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True, check=False,
        timeout=200,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    kills = json.loads(done.stdout.splitlines()[-1])
    assert len(kills) == convert_kill_worker.KILLS
    for before, after in itertools.pairwise(kills):
        assert before["finished"].items() < after["finished"].items()  # what was finished is not written again
    for kill in kills:
        assert "another process is writing this folder" in kill["told"]
        assert not kill["there"]
    last = kills[-1]["finished"]
    assert {name: (out / name).stat().st_mtime_ns for name in last} == last
    convert_kill_worker.run(synthetic[LARGE], straight)
    assert len(list(straight.glob("*.safetensors"))) > len(last)  # it was really killed before its end
    assert not list(tmp_path.glob(".*"))
    for path in straight.iterdir():
        assert (out / path.name).read_bytes() == path.read_bytes(), path.name
