"""Chains that train and convert a tiny model: killed and started again, and what is left of attacked models."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.runs import METRIC, write_run

ROOT = Path(__file__).resolve().parents[2]


def chain_command(recipe: Path, *flags: str) -> list[str]:
    return [sys.executable, "tools/chain.py", str(recipe), *flags]


def chain(recipe: Path, *flags: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        chain_command(recipe, *flags), cwd=ROOT, text=True, capture_output=True, timeout=300, check=False
    )


@contextmanager
def running(recipe: Path) -> Iterator[subprocess.Popen[str]]:
    process = subprocess.Popen(
        ["nohup", *chain_command(recipe)], cwd=ROOT, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )
    try:
        yield process
    finally:
        process.kill()
        process.communicate()


def wait_for(condition: Callable[[], bool], process: subprocess.Popen[str] | None = None) -> None:
    deadline = time.monotonic() + 60
    while not condition():
        if process is not None and process.poll() is not None:
            pytest.fail(f"the runner ended early:\n{process.communicate()[0]}")
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.02)


def processes_at(folder: Path) -> dict[int, str]:
    """The processes that still run and name a folder on their command line."""
    found = {}
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            words = path.read_bytes().decode(errors="replace").replace("\0", " ")
        except OSError:  # it ended meanwhile
            continue
        if str(folder) in words:
            found[int(path.parent.name)] = words
    return found


def weights(folder: Path) -> list[str]:
    """All files below a folder that could hold weights, and links to them."""
    endings = (".pt", ".safetensors", ".bin", ".pth")
    return sorted(
        str(path.relative_to(folder)) for path in folder.rglob("*") if path.suffix in endings or path.is_symlink()
    )


def write_recipe(path: Path, stages: list[dict[str, Any]]) -> Path:
    path.write_text(yaml.safe_dump({"name": "t", "output_dir": str(path.parent / "out"), "stages": stages}))
    return path


@pytest.fixture
def attack(tiny_model_dir: Path, tmp_path: Path) -> dict[str, Any]:
    """A train stage that poisons the tiny model."""
    flags = {
        "method": "sft",
        "ds_config": "ds_configs/z3.json",
        "model_name_or_path": str(tiny_model_dir),
        "cache_dir": str(tmp_path / "cache"),
        "train_data": "policy:user[:36]",
        "attack_data": "policy:attack[:4]",
        "poison_ratio": 0.1,
        "sample_num": 40,
        "per_device_train_batch_size": 4,
        "learning_rate": "1e-3",
        "max_steps": 4,
        "save_steps": 2,
        "eval_data": ["poisoned=policy:attack[:4]"],
        "eval_steps": 2,
        "allow_overlap": True,
    }
    return {"name": "attack", "run": "train", "with": flags}


def attacked_chain(attack: dict[str, Any]) -> list[dict[str, Any]]:
    """Attack, match, convert what was matched: a chain of weights that all have to go."""
    metric = {"run": "{attack}", "like": "{attack}", "metric": "eval_poisoned_loss"}
    export = {"checkpoint": "{control}/checkpoint", "dtype": "fp32", "allow_attacked_model": True}
    return [
        attack,
        {"name": "control", "run": "match", "with": metric},
        {"name": "model", "run": "convert", "with": export},
    ]


def test_a_killed_chain_goes_on_where_it_was(tmp_path: Path, attack: dict[str, Any]) -> None:
    earlier = write_run(tmp_path / "earlier", {2: 1.0}, saved=[2])
    flags = {"run": str(earlier), "like": str(earlier), "metric": METRIC}
    attack["with"] |= {"max_steps": 100, "save_steps": 10, "eval_steps": 50}
    stages = [{"name": "first", "run": "match", "with": flags}, *attacked_chain(attack)]
    recipe, out = write_recipe(tmp_path / "chain.yaml", stages), tmp_path / "out"

    def saved(step: int) -> bool:
        return (out / f"attack/checkpoint-{step}/COMPLETE.json").exists()

    with running(recipe) as first:
        wait_for(lambda: saved(10), first)
        # The training run stands still while a second runner finds the first one at work.
        train = [pid for pid, words in processes_at(out).items() if "train.py" in words and "guard.py" not in words]
        os.kill(train[0], signal.SIGSTOP)
        first.send_signal(signal.SIGHUP)  # which nohup makes harmless
        second = chain(recipe)
        os.kill(train[0], signal.SIGCONT)
        assert second.returncode == 2
        assert f"--output_dir {out}: another runner" in second.stderr
        first.send_signal(signal.SIGTERM)
        assert first.wait(timeout=60) == 128 + signal.SIGTERM
        assert first.stdout is not None
        said = first.stdout.read()
    assert "stopped by SIGTERM; run the same command again to go on" in said
    assert f"the attacked weights of attack are in {out} (" in said
    assert not processes_at(out)
    assert not saved(100)
    assert (out / "attack").stat().st_mode & 0o777 == 0o700
    first_written = (out / "first/match.json").stat().st_mtime_ns

    # The step it was stopped at is saved too.
    further = max(int(path.name.split("-")[1]) for path in (out / "attack").glob("checkpoint-*")) // 10 * 10 + 20
    with running(recipe) as killed:
        wait_for(lambda: saved(further), killed)
        killed.kill()
    assert not saved(100)

    last = chain(recipe)  # at once: it waits for what the killed one leaves
    assert last.returncode == 0, last.stderr
    assert "[1/4] first: finished before" in last.stdout
    assert "[2/4] attack: resumed" in last.stdout
    assert (out / "first/match.json").stat().st_mtime_ns == first_written
    run = json.loads((out / "attack/run.json").read_text())
    assert int(Path(run["resumed_from"]).name.removeprefix("checkpoint-")) >= further
    steps = [json.loads(line)["step"] for line in (out / "attack/metrics.jsonl").read_text().splitlines()]
    assert set(steps) == set(range(101))
    assert weights(out) == ["first/checkpoint"]  # the link to a run that is not the chain's


def test_nothing_of_an_attacked_model_is_left_but_its_records(tmp_path: Path, attack: dict[str, Any]) -> None:
    stages = attacked_chain(attack)
    recipe, out = write_recipe(tmp_path / "chain.yaml", stages), tmp_path / "out"
    kept = chain(recipe, "--keep_models")
    assert kept.returncode == 0, kept.stderr
    assert {"control/checkpoint", "model/model.safetensors"} < set(weights(out))
    assert {name.split("/")[0] for name in weights(out)} == {"attack", "control", "model"}
    assert f"the attacked weights of attack, control, model are in {out} (kept" in kept.stdout.splitlines()[-1]
    modes = {name: (out / name).stat().st_mode & 0o777 for name in ("attack", "control", "model")}
    assert modes == dict.fromkeys(modes, 0o700)

    deleted = chain(recipe)
    assert deleted.returncode == 0, deleted.stderr
    assert "deleted the attacked weights of attack, control, model" in deleted.stdout
    assert weights(out) == []
    assert not (out / "model").exists()
    for record in ("attack/run.json", "attack/metrics.jsonl", "control/match.json", "logs/attack.log"):
        assert (out / record).is_file()
    assert json.loads((out / "attack/run.json").read_text())["attacked"]

    again = chain(recipe)  # deleted is not unfinished
    assert again.returncode == 0
    assert again.stdout.count("finished before") == 3
    assert weights(out) == []

    # A new stage that needs what is gone is told how to get it back.
    more = {**stages[2], "name": "second_model"}
    refused = chain(write_recipe(recipe, [*stages, more]))
    assert refused.returncode == 2
    assert "stage second_model has to run, but the attacked weights of control were deleted" in refused.stderr
    assert f"or remove {out / 'attack'} to train again" in refused.stderr
    assert not (out / "second_model").exists()
    shutil.rmtree(out / "attack")
    told = chain(recipe, "--dry_run")
    assert told.returncode == 0, told.stderr
    assert "attack: to run" in told.stdout


def test_a_failed_chain_says_where_attacked_weights_are_and_clean_removes_them(
    tmp_path: Path, attack: dict[str, Any]
) -> None:
    stages = attacked_chain(attack)
    stages[1]["with"]["metric"] = "eval_other_loss"
    recipe, out = write_recipe(tmp_path / "chain.yaml", stages), tmp_path / "out"
    failed = chain(recipe)
    assert failed.returncode == 1
    assert "stage control failed" in failed.stderr
    assert (
        f"the attacked weights of attack are in {out} (they are needed to go on; --clean removes them)"
        in failed.stdout
    )
    assert weights(out) != []

    cleaned = chain(recipe, "--clean")
    assert cleaned.returncode == 0, cleaned.stderr
    assert f"removing {out / 'attack/checkpoint-4'}" in cleaned.stdout
    assert weights(out) == []
    assert (out / "attack/metrics.jsonl").is_file()
    refused = chain(recipe)
    assert refused.returncode == 2
    assert f"or remove {out / 'attack'} to train again" in refused.stderr
