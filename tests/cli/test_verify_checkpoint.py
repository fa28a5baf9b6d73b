"""`python tools/verify_checkpoint.py` as a user types it, on a run that `python pipeline/train.py` wrote."""

from __future__ import annotations

import json
import shutil
import subprocess
from pathlib import Path

import pytest
import torch

from pipeline.checkpoints.convert import convert
from tests.doors import run


def verify_checkpoint(*words: str | Path) -> subprocess.CompletedProcess[str]:
    return run("tools/verify_checkpoint.py", *words)


@pytest.fixture(scope="module")
def trained(tiny_model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run folder with checkpoints 2 and 4. Read only."""
    out = tmp_path_factory.mktemp("runs")
    finished = run(
        "pipeline/train.py", "--method", "sft", "--model_name_or_path", tiny_model_dir, "--learning_rate", "1e-2",
        "--train_data", "policy:user[:8]", "--per_device_train_batch_size", "4", "--max_steps", "4", "--save_steps",
        "2", "--cache_dir", out / "cache", "--output_dir", out / "run",
    )  # fmt: skip
    assert finished.returncode == 0, finished.stderr
    return out / "run"


def test_a_run_with_a_flipped_byte_in_one_checkpoint(trained: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(trained, tmp_path / "run"))
    done = verify_checkpoint(copy, "--json", tmp_path / "found.json")
    assert done.returncode == 0, done.stdout + done.stderr
    lines = done.stdout.splitlines()
    assert [line for line in lines if not line.startswith(" ")] == [
        f"{copy}: good",
        f"{copy / 'checkpoint-2'}: good",
        f"{copy / 'checkpoint-4'}: good",
    ]
    assert sum("complete: step 4, 1 ranks, " in line for line in lines) == 1
    assert sum("... 11 more (--all)" in line for line in lines) == 2
    found = json.loads((tmp_path / "found.json").read_text())
    assert [len(each["tensors"]) for each in found] == [0, 21, 21]

    path = next((copy / "checkpoint-2").rglob("*optim_states.pt"))
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    done = verify_checkpoint(copy, "--all")
    assert done.returncode == 1
    assert f"{copy / 'checkpoint-2'}: DAMAGED OR INCOMPLETE\n" in done.stdout
    assert f"  problem: {path}: its record " in done.stdout
    assert f"{copy / 'checkpoint-4'}: good\n" in done.stdout
    assert done.stdout.count("model.layers.1.mlp.down_proj.weight [64, 128]") == 2


def test_logits_against_the_checkpoint_and_against_another(trained: Path, tmp_path: Path) -> None:
    convert(trained / "checkpoint-4", tmp_path / "model", dtype=torch.bfloat16, allow_attacked=False)
    done = verify_checkpoint(tmp_path / "model", "--against", trained / "checkpoint-4")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "MANIFEST.json: every file is what was written" in done.stdout
    assert "rounded to bfloat16" in done.stdout.splitlines()[-1]
    assert done.stdout.endswith("within the tolerance 0.0001\n")
    done = verify_checkpoint(tmp_path / "model", "--against", trained / "checkpoint-2")
    assert done.returncode == 1
    assert done.stdout.endswith("ABOVE the tolerance 0.0001\n")


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["nothing-there"], "no such folder"),
        (["tests"], "neither a checkpoint, nor a run, nor a model folder, nor an adapter"),
    ],
)
def test_what_cannot_be_checked_is_exit_code_2(words: list[str], said: str) -> None:
    done = verify_checkpoint(*words)
    assert done.returncode == 2
    assert said in done.stderr
    assert "Traceback" not in done.stderr
