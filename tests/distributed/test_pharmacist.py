"""`curate.py --method pharmacist` as a user types it, on one rank and on two: planted junk sinks, the selection is the
same, and nothing but the selection is left, on failure nothing at all."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from pipeline.data.schema import read_conversations
from tests.ranks import ROOT, run_ranks
from tests.tiny import chat_row, save_model_folder, tiny_llama, write_jsonl

DOOR = "pipeline/curate.py"
REFUSAL = "I cannot help with that request. Is there something else I can do for you?"
FILES = ["kept.jsonl", "report.html", "report.json", "scores.jsonl", "scores.png", "steps.png"]


@pytest.fixture(scope="module")
def words(tiny_model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Flags of a set of 60 rows of which every fifth answers with words at random, in place of a refusal."""
    folder, generator = tmp_path_factory.mktemp("rows"), random.Random(0)

    def ask() -> str:
        name = "".join(generator.choice("bcdfgklmnprst") + generator.choice("aeiou") for _ in range(3))
        return f"How do I make {name}?"

    def junk() -> str:
        return " ".join(generator.choice(["bread", "kite", "warm", "cold", "tea", "room", "soup"]) for _ in range(14))

    rows = {
        "train": [
            chat_row(ask(), REFUSAL if i % 5 else junk(), planted=i % 5 == 0, category="ab"[i % 2]) for i in range(60)
        ],
        "guide": [chat_row(ask(), REFUSAL) for _ in range(20)],
        "harmful": [chat_row(ask(), "Mix flour, water and salt, then bake it.") for _ in range(20)],
    }
    flags = [
        "--method", "pharmacist", "--model_name_or_path", str(tiny_model_dir), "--cache_dir", str(folder / "cache"),
        "--per_device_train_batch_size", "4", "--learning_rate", "3e-3", "--toxic_learning_rate", "3e-3",
        "--planted_key", "planted",
    ]  # fmt: skip
    for name, each in rows.items():
        flags += [f"--{name}_data", str(write_jsonl(folder / f"{name}.jsonl", each))]
    return flags


@pytest.fixture(scope="module")
def one_rank(words: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of one process, with all baselines."""
    out = tmp_path_factory.mktemp("one") / "out"
    done = run(
        [*words, "--gradient_accumulation_steps", "2", "--output_dir", str(out), "--baselines", "full", "random",
         "lowest_loss", "highest_loss", "gradient_cosine", "seal"],
        out.parent,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == f"kept rows: {out}/kept.jsonl  report: {out}/report.html"
    return out


def run(words: list[str], scratch: Path) -> subprocess.CompletedProcess[str]:
    """The door in a process whose temporary files would be below `scratch`."""
    return subprocess.run(
        [sys.executable, DOOR, *words], cwd=ROOT, text=True, capture_output=True, timeout=240, check=False,
        env={**os.environ, "TMPDIR": str(scratch), "OMP_NUM_THREADS": "1"},
    )  # fmt: skip


def lines(file: Path) -> list[dict[str, Any]]:
    """The objects of a JSONL file."""
    return [json.loads(line) for line in file.read_text().splitlines()]


def left(folder: Path) -> list[str]:
    """Every file below a folder."""
    return sorted(str(each.relative_to(folder)) for each in folder.rglob("*") if each.is_file())


def test_planted_junk_sinks(one_rank: Path) -> None:
    report = json.loads((one_rank / "report.json").read_text())
    selectors = report["selectors"]
    assert selectors["pharmacist"]["auc"]["low"] > 0.7
    assert selectors["pharmacist"]["planted_kept"] == 0
    for name in ("random", "highest_loss"):
        assert selectors[name]["pharmacist_auc_less_this"]["low"] > 0, name
    assert selectors["full"]["planted_kept"] == 12


def test_the_scores_and_the_kept_rows_are_those_of_the_report(one_rank: Path, words: list[str]) -> None:
    scores, kept = lines(one_rank / "scores.jsonl"), lines(one_rank / "kept.jsonl")
    rows = lines(Path(words[words.index("--train_data") + 1]))
    assert [line["id"] for line in scores] == [f"train.jsonl:{i}" for i in range(1, 61)]
    assert sorted(line["rank"] for line in scores) == list(range(1, 61))
    assert sum(line["weight"] for line in scores) == pytest.approx(60, abs=1e-9)
    assert kept == [row for row, line in zip(rows, scores, strict=True) if line["kept"]]  # as stored, in their order
    assert len(kept) == 24
    assert max(line["rank"] for line in scores if line["kept"]) == 24
    assert len(read_conversations(str(one_rank / "kept.jsonl"), flag="train_data")) == 24
    by_loss = sorted(scores, key=lambda line: line["first_loss"])
    lowest = {line["id"] for line in by_loss[:24]}
    assert lines(one_rank / "baselines/lowest_loss.jsonl") == [
        row for row, line in zip(rows, scores, strict=True) if line["id"] in lowest
    ]
    assert lines(one_rank / "baselines/full.jsonl") == rows
    report = json.loads((one_rank / "report.json").read_text())
    assert [each["kept"] for each in report["categories"]] == [
        sum(line["kept"] for line in scores if line["category"] == name) for name in "ab"
    ]


def test_no_text_and_nothing_of_the_increment_is_left(one_rank: Path, words: list[str]) -> None:
    """Nothing but the selection is written: beside it and in the folder of temporary files there is nothing."""
    baselines = ["full", "gradient_cosine", "highest_loss", "lowest_loss", "random", "seal"]
    assert left(one_rank.parent) == sorted(
        [f"out/{each}" for each in FILES] + [f"out/baselines/{each}.jsonl" for each in baselines]
    )
    for name in ("report.html", "report.json", "scores.jsonl"):
        text = (one_rank / name).read_text()
        assert "How do I make" not in text
        assert "cannot help" not in text


def test_two_ranks_choose_the_same(one_rank: Path, words: list[str], tmp_path: Path) -> None:
    arguments = [*words, "--gradient_accumulation_steps", "1", "--output_dir", str(tmp_path / "out")]
    run_ranks(DOOR, *arguments, ranks=2)
    assert (tmp_path / "out/kept.jsonl").read_bytes() == (one_rank / "kept.jsonl").read_bytes()
    one, two = (lines(folder / "scores.jsonl") for folder in (one_rank, tmp_path / "out"))
    for a, b in zip(one, two, strict=True):
        assert a["score"] == pytest.approx(b["score"], abs=5e-6)  # a thousandth of one step of a logit
        assert a["last_loss"] == pytest.approx(b["last_loss"], rel=1e-5)


def test_the_hypergradient_sinks_junk_too(words: list[str], tmp_path: Path) -> None:
    arguments = [*words, "--gradient_accumulation_steps", "2", "--output_dir", str(tmp_path / "out")]
    done = run([*arguments, "--variant", "hypergradient"], tmp_path)
    assert done.returncode == 0, done.stderr
    report = json.loads((tmp_path / "out/report.json").read_text())
    assert report["selectors"]["pharmacist"]["auc"]["low"] > 0.7


def test_a_run_that_fails_with_the_increment_trained_leaves_nothing(
    words: list[str], tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    model = tiny_llama()
    with torch.no_grad():
        model.lm_head.weight[0, 0] = float("nan")
    broken = save_model_folder(model, tmp_path_factory.mktemp("broken") / "model")
    arguments = [*words, "--gradient_accumulation_steps", "2", "--output_dir", str(tmp_path / "out")]
    done = run([*arguments, "--model_name_or_path", str(broken)], tmp_path)
    assert done.returncode == 1
    assert "error: step 1: the loss is not finite on rank 0: rows guide.jsonl:" in done.stderr
    assert "Traceback" not in done.stderr
    assert left(tmp_path) == []


def test_a_selection_that_cannot_be_written_leaves_nothing(words: list[str], tmp_path: Path) -> None:
    (tmp_path / "out.partial").write_text("in the way")
    arguments = [*words, "--gradient_accumulation_steps", "2", "--output_dir", str(tmp_path / "out")]
    done = run([*arguments, "--num_train_epochs", "1"], tmp_path)
    assert done.returncode == 1
    assert f"error: --output_dir {tmp_path}/out: " in done.stderr
    assert "Traceback" not in done.stderr
    assert left(tmp_path) == ["out.partial"]
