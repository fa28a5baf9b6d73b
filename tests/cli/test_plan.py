"""tools/plan.py as its users call it: what it prints and writes, and every problem at once."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from pipeline.config import ModelArguments, parse
from pipeline.planning.arguments import PlanArguments
from tests.ranks import ROOT


def plan(*words: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "tools/plan.py", *map(str, words)],
        cwd=ROOT, capture_output=True, text=True, check=False, timeout=300,
    )  # fmt: skip


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, dict[str, object]]:
    """A 70B plan on four nodes: what was printed, and plan.json."""
    out = tmp_path_factory.mktemp("plan") / "out"
    done = plan(
        "--model_name_or_path", "70b", "--nodes", 4, "--gradient_checkpointing", "--per_device_train_batch_size", 4,
        "--output_dir", out,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout, json.loads((out / "plan.json").read_text())


def test_a_70b_plan_needs_no_gpu_and_no_weights(written: tuple[str, dict[str, object]]) -> None:
    text, figures = written
    assert figures["prediction"] is True
    assert figures["parameters"] == 70_553_706_496
    assert f"{int(str(figures['peak'])) / 2**30:.2f} GiB  peak: fits" in text
    for line in (
        "prediction ",
        "memory a GPU",
        "activations ",
        "a step takes",
        "host memory",
        "checkpoint ",
        "links ",
    ):
        assert f"\n{line}" in f"\n{text}"
    assert [row.split("|")[1].strip() for row in text.splitlines() if row.startswith("| ")][2:] == [
        "1 x 8", "2 x 8", "4 x 8",
    ]  # fmt: skip


def test_flags_recipe_and_ds_config_are_those_of_train(tiny_model_dir: Path, tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        f"model_name_or_path: {tiny_model_dir}\nmethod: surgery\nalpha: 100\nreferences_per_step: 2\n"
        "reference_max_length: 64\nmax_length: 128\nmax_tokens_per_device: 1156\nlora_r: 8\n"
    )
    done = plan("--config", recipe, "--ds_config", "ds_configs/z3_offload.json", "--gpus_per_node", 2)
    assert done.returncode == 0, done.stderr
    assert "10 rows of 90 tokens, 450 of them trained, and 4 reference texts of 256 together" in done.stdout
    assert "host transfers" in done.stdout


def test_no_flag_at_all_is_a_command_line() -> None:
    parsed = parse([ModelArguments, PlanArguments], [], description="")
    assert parsed[PlanArguments] == PlanArguments()


def test_every_problem_is_named_at_once(tmp_path: Path) -> None:
    config = tmp_path / "ds.json"
    config.write_text('{"zero_optimization": {"stage": 2}}')
    done = plan(
        "--model_name_or_path", tmp_path / "none", "--ds_config", config, "--lora_alpha", 3,
        "--gradient_checkpointing_kwargs", "{",
    )  # fmt: skip
    assert done.returncode == 2
    assert "Traceback" not in done.stderr
    for flag in (
        "--model_name_or_path",
        "--ds_config",
        "--lora_alpha 3 has no effect",
        "--gradient_checkpointing_kwargs",
    ):
        assert flag in done.stderr
    passes = plan("--model_name_or_path", "7b", "--method", "booster")
    assert passes.returncode == 2
    assert "--method booster: its step takes more than one forward and one backward pass" in passes.stderr
    wrong = plan("--gpu", "h100", "--nodes", 0, "--alfa", 3)
    assert wrong.returncode == 2
    for problem in (
        "--gpu h100 is unknown; did you mean h100-80gb",
        "--nodes 0: give 1 or more",
        "did you mean alpha",
    ):
        assert problem in wrong.stderr


def test_simulate_writes_a_table_that_says_it_is_a_prediction_and_two_pictures(tmp_path: Path) -> None:
    out = tmp_path / "out"
    done = plan(
        "--simulate", "--nodes", 2, "--gradient_checkpointing", "--per_device_train_batch_size", 2, "--output_dir", out
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout == (out / "simulation.md").read_text()
    assert "Predicted by tools/plan.py, not measured" in done.stdout
    rows = [line.split("|")[1].strip() for line in done.stdout.splitlines() if line.startswith("| ")]
    assert rows[2:] == [size for size in ("7b", "8b", "13b", "34b", "70b") for _ in range(2)]
    for name in ("memory.png", "step_time.png"):
        assert (out / name).read_bytes().startswith(b"\x89PNG")
    assert set(json.loads((out / "simulation.json").read_text())) == {"7b", "8b", "13b", "34b", "70b"}
