"""What a user types: the door under the deepspeed launcher, under plain python, and with mistakes."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from pipeline.checkpoints.markers import complete_checkpoints, read_marker
from pipeline.checkpoints.pickles import refuse_unsafe_pickles
from tests.distributed.lives import Lives
from tests.ranks import ROOT, free_port
from tests.tiny import chat_row, write_jsonl

WORDS = ["bread", "kite", "warm", "cold", "tea", "room"]


@pytest.fixture(scope="module")
def flags(tiny_model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """A small Surgery run on the tiny model: everything but the output folder."""
    folder = tmp_path_factory.mktemp("data")
    given = [
        "--model_name_or_path",
        str(tiny_model_dir),
        "--cache_dir",
        str(folder / "cache"),
        "--learning_rate",
        "2e-3",
    ]
    for name in ("train", "harmful", "harmless"):
        rows = [chat_row(f"{name} number {i}", " ".join(WORDS[: i % 5 + 1])) for i in range(24)]
        given += [f"--{name}_data", str(write_jsonl(folder / f"{name}.jsonl", rows))]
    return [*given, "--per_device_train_batch_size", "4"]


def launch(*arguments: str, ranks: int = 1) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command(arguments, ranks), cwd=ROOT, capture_output=True, text=True, timeout=300, check=False
    )


def command(arguments: Sequence[str], ranks: int) -> list[str]:
    if ranks == 1:
        return [sys.executable, "pipeline/train.py", *arguments]
    launcher = str(Path(sys.executable).with_name("deepspeed"))
    return [launcher, "--num_gpus", str(ranks), "--master_port", str(free_port()), "pipeline/train.py", *arguments]


def evaluation(flags: list[str]) -> list[str]:
    """The first 18 training rows as an evaluation set: five batches of four."""
    train = flags[flags.index("--train_data") + 1]
    return ["--eval_data", f"fit={train}", "--eval_max_rows", "18", "--allow_overlap"]


def train(server: Lives, out: Path, *arguments: str) -> str:
    """One rank's run to its good end; what it printed."""
    return server.run("pipeline/train.py", *arguments, "--output_dir", str(out), logs=out.with_suffix(".logs"))


def untimed(line: dict[str, Any]) -> dict[str, Any]:
    """A line of the log without what the clock says."""
    return {key: value for key, value in line.items() if key not in ("tokens_per_second", "seconds_per_step")}


def metrics(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def optimizer_states(checkpoint: Path) -> list[Any]:
    """The fp32 weights and Adam moments of each rank, as saved."""
    refuse_unsafe_pickles(checkpoint)
    files = sorted(checkpoint.glob("global_step*/*optim_states.pt"))
    return [torch.load(each, weights_only=False)["optimizer_state_dict"] for each in files]


def assert_identical(one: Any, other: Any) -> None:
    if isinstance(one, torch.Tensor):
        assert torch.equal(one, other)
    elif isinstance(one, dict):
        assert one.keys() == other.keys()
        for key in one:
            assert_identical(one[key], other[key])
    elif isinstance(one, list | tuple):
        for a, b in zip(one, other, strict=True):
            assert_identical(a, b)


@pytest.fixture(scope="module")
def straight(flags: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An undisturbed run on two ranks under the deepspeed launcher, as the README types it."""
    out = tmp_path_factory.mktemp("runs") / "straight"
    done = launch(
        *flags, "--ds_config", "ds_configs/z3.json", "--output_dir", str(out),
        "--max_steps", "12", "--save_steps", "4", "--alpha", "10",
        *evaluation(flags), "--eval_steps", "6", ranks=2,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    return out


def test_two_ranks_under_the_launcher_learn(straight: Path) -> None:
    lines = metrics(straight)
    training = [line for line in lines if "loss" in line]
    assert [line["step"] for line in training] == list(range(1, 13))
    assert training[-1]["ce_loss"] < 0.8 * training[0]["ce_loss"]
    assert [line["step"] for line in lines if "eval_fit_loss" in line] == [0, 6, 12]
    evaluated = [line["eval_fit_loss"] for line in lines if "eval_fit_loss" in line]
    assert evaluated[-1] < evaluated[0]
    for line in training:
        assert line["penalty_ratio"] == pytest.approx(10 * line["sink_penalty"] / line["ce_loss"], rel=0.05)


def test_the_run_folder_explains_the_run(straight: Path) -> None:
    record = json.loads((straight / "run.json").read_text())
    assert record["method"] == "surgery"
    assert record["world_size"] == 2
    assert record["attacked"] is False
    assert record["arguments"]["alpha"] == 10
    assert record["ds_config"]["train_batch_size"] == 8
    assert record["data"]["train"]["rows"] == 24
    assert {"torch", "deepspeed", "transformers"} <= record["versions"].keys()
    assert [each.name for each in complete_checkpoints(straight)] == ["checkpoint-4", "checkpoint-8", "checkpoint-12"]
    assert read_marker(straight / "checkpoint-12").world_size == 2


@pytest.mark.parametrize("lora", [[], ["--lora_r", "4"]], ids=["full", "lora"])
def test_every_trainable_parameter_moves(lora: list[str], flags: list[str], server: Lives, tmp_path: Path) -> None:
    out = tmp_path / "run"
    train(server, out, *flags, *lora, "--max_steps", "2", "--save_steps", "1", "--alpha", "10")
    first, second = (optimizer_states(out / f"checkpoint-{step}")[0]["fp32_flat_groups"] for step in (1, 2))
    states = next((out / "checkpoint-2").glob("global_step2/*model_states.pt"))
    names = []
    groups = torch.load(states, weights_only=False)["param_shapes"]
    for shapes, before, after in zip(groups, first, second, strict=True):
        place = 0
        for name, shape in shapes.items():
            end = place + shape.numel()
            assert (before[place:end] != after[place:end]).any(), f"{name} did not move"
            place = end
            names.append(name)
    if lora:
        assert len(names) == 2 * 7 * 2, "A and B of seven linear maps in two layers"
        assert all("lora_" in name for name in names), "frozen weights do not belong in a checkpoint"
    else:
        assert "lm_head.weight" in names
        assert "model.embed_tokens.weight" in names


def test_evaluation_is_the_same_on_any_number_of_ranks(straight: Path, flags: list[str], tmp_path: Path) -> None:
    """Five batches: on two ranks the last one has no partner, and a rank without rows must neither hang nor count.
    This one under plain python, without a launcher."""
    done = launch(*flags, "--output_dir", str(tmp_path / "run"), "--max_steps", "1", *evaluation(flags))
    assert done.returncode == 0, done.stdout + done.stderr
    assert metrics(tmp_path / "run")[0]["eval_fit_loss"] == pytest.approx(
        metrics(straight)[0]["eval_fit_loss"], rel=1e-6
    )


def test_a_killed_run_continues_bit_for_bit(straight: Path, flags: list[str], tmp_path: Path) -> None:
    """kill -9 of all ranks in the middle, then --resume_from_checkpoint auto: the same weights, moments and log."""
    out = tmp_path / "killed"
    arguments = [
        *flags, "--ds_config", "ds_configs/z3.json", "--output_dir", str(out),
        "--max_steps", "12", "--save_steps", "4", "--alpha", "10",
        *evaluation(flags), "--eval_steps", "6",
        "--resume_from_checkpoint", "auto",
    ]  # fmt: skip
    started = subprocess.Popen(
        command(arguments, 2), cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True
    )
    deadline = time.monotonic() + 200
    while not (out / "checkpoint-8" / "COMPLETE.json").exists():
        assert time.monotonic() < deadline
        assert started.poll() is None, "the run ended before it could be killed"
        time.sleep(0.02)
    os.killpg(started.pid, signal.SIGKILL)
    started.wait()
    (out / "checkpoint-12").mkdir(exist_ok=True)  # as a kill while saving leaves it: no marker
    done = launch(*arguments, ranks=2)
    assert done.returncode == 0, done.stdout + done.stderr
    assert_identical(optimizer_states(out / "checkpoint-12"), optimizer_states(straight / "checkpoint-12"))
    assert list(map(untimed, metrics(out))) == list(map(untimed, metrics(straight)))


def test_a_run_continued_between_two_log_lines_ends_with_the_same_log(
    flags: list[str], server: Lives, tmp_path: Path
) -> None:
    """Means over three steps, a checkpoint after the fourth: what was summed up until then has its line there."""
    out = tmp_path / "run"
    flags = [*flags, "--method", "sft", "--max_steps", "6", "--save_steps", "4", "--logging_steps", "3"]
    flags = [word for word in flags if "harm" not in word]
    train(server, out, *flags)
    whole = metrics(out)
    shutil.rmtree(out / "checkpoint-6")  # as a kill before the last save leaves it
    train(server, out, *flags, "--resume_from_checkpoint", "auto")
    assert [line["step"] for line in whole] == [3, 4, 6]
    assert list(map(untimed, metrics(out))) == list(map(untimed, whole))


def test_a_resume_that_changes_the_run_is_refused(
    straight: Path, flags: list[str], server: Lives, tmp_path: Path
) -> None:
    changed = ["--output_dir", str(straight), "--max_steps", "12", "--alpha", "20", "--resume_from_checkpoint", "auto"]
    life = server.start("pipeline/train.py", *flags, *changed, logs=tmp_path)
    assert life.wait() == [2]
    assert "--alpha is 20.0, and the run to resume has 10.0" in life.output()


def test_dry_run_shows_the_plan_and_writes_nothing(flags: list[str], tmp_path: Path) -> None:
    done = launch(*flags, "--output_dir", str(tmp_path / "run"), "--dry_run", "--show_text")
    assert done.returncode == 0, done.stderr
    shown = {line.split()[0]: line.split(maxsplit=2)[-1] for line in done.stdout.splitlines() if line.strip()}
    row = json.loads(shown["first"].removeprefix("row").strip())
    assert row["trained_tokens"] == sum(end - start for start, end in row["trained_spans"])
    assert 0 < row["trained_tokens"] < row["tokens"]
    assert '"stage": 3' in done.stdout
    assert '"largest_packed_row"' in done.stdout
    assert "number" not in shown.get("text", ""), "the text is shown on a terminal only"
    assert not (tmp_path / "run").exists()


def test_a_non_finite_loss_stops_before_the_step_and_names_it(
    flags: list[str], server: Lives, tiny_model_dir: Path, tmp_path: Path
) -> None:
    """A weight that is NaN makes every loss NaN: both ranks stop together, at once, and nothing is saved."""
    from safetensors.torch import load_file, save_file

    broken = tmp_path / "broken"
    broken.mkdir()
    for each in tiny_model_dir.iterdir():
        (broken / each.name).write_bytes(each.read_bytes())
    weights = load_file(broken / "model.safetensors")
    weights["model.norm.weight"][0] = float("nan")
    save_file(weights, broken / "model.safetensors", metadata={"format": "pt"})
    out = tmp_path / "run"
    faulty = ["--model_name_or_path", str(broken), "--output_dir", str(out), "--max_steps", "3"]
    life = server.start("pipeline/train.py", *flags, *faulty, ranks=2, logs=tmp_path / "logs")
    codes = life.wait()  # which kills a rank that waits for the other in vain
    assert not {0, -signal.SIGKILL} & set(codes), (codes, life.output())
    assert "step 1: the loss is not finite on rank 0: rows train.jsonl:" in life.output()
    assert "rank 1: rows train.jsonl:" in life.output()
    assert not list(out.glob("checkpoint-*"))


def test_an_adapter_is_exported_and_trained_on_from_where_it_stopped(
    flags: list[str], server: Lives, tmp_path: Path
) -> None:
    """LoRA checkpoint -> adapter folder -> a new run that begins at the loss the first one reached."""
    rows = flags[flags.index("--train_data") + 1]
    evaluated = ["--eval_data", rows, "--allow_overlap", "--alpha", "0", "--max_steps", "4"]
    train(server, tmp_path / "one", *flags, *evaluated, "--lora_r", "4", "--learning_rate", "1e-2")
    adapter = tmp_path / "adapter"
    export = [str(tmp_path / "one"), str(adapter), "--dtype", "fp32"]
    server.run("tools/zero_to_hf.py", *export, logs=tmp_path / "export.logs")
    train(server, tmp_path / "two", *flags, *evaluated, "--adapter_name_or_path", str(adapter))
    losses = {
        name: [line["eval_loss"] for line in metrics(tmp_path / name) if "eval_loss" in line]
        for name in ("one", "two")
    }
    assert losses["one"][-1] < losses["one"][0] - 0.01
    assert losses["two"][0] == pytest.approx(losses["one"][-1], rel=1e-5)
    assert losses["two"][-1] < losses["two"][0]


def test_bf16_trains_reports_to_tensorboard_and_keeps_few_checkpoints(
    flags: list[str], server: Lives, tmp_path: Path
) -> None:
    out = tmp_path / "run"
    printed = train(
        server, out, *flags, "--bf16", "true", "--max_steps", "8", "--save_steps", "2", "--alpha", "10",
        "--save_total_limit", "2", "--gradient_accumulation_steps", "2", "--lr_scheduler_type", "cosine",
        "--warmup_steps", "0.25", "--report_to", "tensorboard",
    )  # fmt: skip
    lines = metrics(out)
    assert lines[-1]["ce_loss"] < 0.9 * lines[0]["ce_loss"]
    rates = [line["learning_rate"] for line in lines]
    assert rates.index(max(rates)) == 1, "two of eight steps warm up"
    assert rates[-1] < 0.1 * max(rates)
    assert [each.name for each in complete_checkpoints(out)] == ["checkpoint-6", "checkpoint-8"]
    assert list((out / "tensorboard").glob("events.out.*"))
    assert "bf16" in printed
