"""`python pipeline/assess.py` as a user types it."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from pipeline.evaluation.jsonl import read_lines
from tests import suite_rows

ROOT = Path(__file__).resolve().parents[2]


def command(*words: str | Path) -> list[str]:
    return [sys.executable, "pipeline/assess.py", *map(str, words)]


def assess(*words: str | Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command(*words), cwd=ROOT, text=True, capture_output=True, timeout=300, check=False)


@pytest.fixture
def words(tiny_model_dir: Path) -> list[str | Path]:
    """Small batches: many of them, so that a kill falls between two."""
    return ["--model_name_or_path", tiny_model_dir, "--batch_size", "2", "--max_new_tokens", "16"]


def test_a_killed_evaluation_goes_on_and_ends_identical(words: list[str | Path], tmp_path: Path) -> None:
    words += ["--loss_data", "benign=policy:benign[:8]", "poisoned=policy:attack[:8]"]
    finished = assess(*words, "--output_dir", tmp_path / "straight")
    assert finished.returncode == 0, finished.stderr

    killed = tmp_path / "killed"
    answers = killed / "answers-policy.jsonl.part0"
    with subprocess.Popen(
        command(*words, "--output_dir", killed), cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    ) as process:
        deadline = time.monotonic() + 120
        while not answers.exists() or answers.read_bytes().count(b"\n") < 20:
            assert process.poll() is None, "it ended before it could be killed"
            assert time.monotonic() < deadline
            time.sleep(0.01)
        process.send_signal(signal.SIGKILL)
    assert 20 <= len(read_lines(answers)) < 220
    with answers.open("ab") as file:
        file.write(b'{"id": "policy:test_')  # a kill while a line was written
    again = assess(*words, "--output_dir", killed)
    assert again.returncode == 0, again.stderr
    for name in ("answers-policy.jsonl", "verdicts-policy.jsonl", "losses.jsonl", "results.json"):
        assert (killed / name).read_bytes() == (tmp_path / "straight" / name).read_bytes(), name
    assert not list(killed.glob("*.partial"))


@pytest.mark.parametrize("how", ["num_workers", "ranks"])
def test_two_workers_give_the_same_files(how: str, words: list[str | Path], tmp_path: Path) -> None:
    one, two = tmp_path / "one", tmp_path / "two"
    finished = assess(*words, "--output_dir", one)
    assert finished.returncode == 0, finished.stderr
    if how == "num_workers":
        finished = assess(*words, "--num_workers", "2", "--output_dir", two)
        assert finished.returncode == 0, finished.stderr
    else:
        ranks = [
            subprocess.Popen(
                command(*words, "--output_dir", two),
                cwd=ROOT,
                env={**os.environ, "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2"},
                stdout=subprocess.DEVNULL,
            )
            for rank in (1, 0)
        ]
        assert [rank.wait(timeout=240) for rank in ranks] == [0, 0]
    names = sorted(path.name for path in one.iterdir())
    assert names == sorted(path.name for path in two.iterdir())
    for name in names:
        assert (one / name).read_bytes() == (two / name).read_bytes(), name


def test_phases_run_apart_and_need_only_the_folder(words: list[str | Path], tmp_path: Path) -> None:
    words[words.index("--batch_size") + 1] = "64"
    out = ["--output_dir", tmp_path / "out"]
    data = ["--suite_data", f"xstest={suite_rows.xstest(tmp_path)}", f"sst2={suite_rows.sst2(tmp_path)}"]
    early = assess("judge", *out)
    assert early.returncode == 2
    assert "holds no answers; run `python pipeline/assess.py generate` first" in early.stderr
    generated = assess("generate", *words, *out, "--suites", "policy,xstest,sst2", *data)
    assert generated.returncode == 0, generated.stderr
    assert not list((tmp_path / "out").glob("verdicts*"))
    early = assess("report", *out)
    assert early.returncode == 2
    assert "no such file; run `python pipeline/assess.py judge` first" in early.stderr
    judged = assess("judge", *out)
    assert judged.returncode == 0, judged.stderr
    reported = assess("report", *out)
    assert reported.returncode == 0, reported.stderr
    assert "unsafe_compliance" in reported.stdout
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    assert set(results["suites"]) == {"policy", "xstest", "sst2"}
    assert results["suites"]["xstest"]["over_refusal"]["by"]["homonyms"]["n"] == 1
    assert results["settings"]["suites"]["xstest"]["judge"]["name"] == "refusal_xstest"
    again = assess("judge", *out, "--judges", "xstest=refusal_advbench")
    assert again.returncode == 2
    assert "holds verdicts of another judge (its name, template_sha256 differs)" in again.stderr
    (tmp_path / "sst2.jsonl").write_text('{"sentence": "another film", "label": 1}\n')
    changed = assess("judge", *out)
    assert changed.returncode == 2
    assert "--suite_data sst2=" in changed.stderr
    assert "not the rows that were asked" in changed.stderr


def test_the_paper_protocol_leaves_its_record(words: list[str | Path], tmp_path: Path) -> None:
    """All harmful suites with a baseline judge in place of the 7B one."""
    names = ["beavertails", "harmbench", "sorrybench"]
    data = [f"{name}={suite_rows.WRITERS[name](tmp_path)}" for name in names]
    judges = [f"{name}=refusal_advbench" for name in names]
    done = assess(
        *words, "--output_dir", tmp_path / "out", "--suites", ",".join(names), "--suite_data", *data,
        "--judges", *judges, "--protocol", "paper",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "CC-BY-NC-4.0" in done.stdout
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    for name in names:
        settings = results["settings"]["suites"][name]
        assert settings["protocol"] == "paper"
        assert settings["bos_tokens"] == 0  # this tokenizer adds none, and the Alpaca prompt has none
        assert settings["n"] == results["suites"][name]["harmful_score"]["n"] == 4
    assert set(results["suites"]["harmbench"]["harmful_score"]["by"]) == {"weather", "kitchen", "copyright"}


def test_console_shows_scores_and_no_answer(words: list[str | Path], tmp_path: Path) -> None:
    words[words.index("--batch_size") + 1] = "110"
    finished = assess(*words, "--output_dir", tmp_path)
    assert finished.returncode == 0, finished.stderr
    shown = finished.stdout + finished.stderr
    results: dict[str, Any] = json.loads((tmp_path / "results.json").read_text())
    for name, score in results["suites"]["policy"].items():
        line = next(line for line in finished.stdout.splitlines() if name in line)
        assert f"{score['value']:.1%}" in line
        assert f"{score['k']} of {score['n']}" in line
    texts = {line["answer"] for line in read_lines(tmp_path / "answers-policy.jsonl") if len(line["answer"]) > 8}
    assert texts
    assert not [text for text in texts if text in shown]


def test_bad_input_exits_with_2_and_one_line(words: list[str | Path], tmp_path: Path) -> None:
    for extra, message in (
        (["--sutes", "policy"], "did you mean suites?"),
        (["--batch_size", "0"], "at least 1"),
        (["--num_workers", "0"], "--num_workers 0: must be at least 1"),
        (["--engine", "vllm"], "pip install -e '.[vllm]'"),
        (["--judge_model", "harmbench=x"], "no suite here has this judge"),
    ):
        finished = assess(*words, "--output_dir", tmp_path / "out", *extra)
        assert finished.returncode == 2
        assert finished.stderr.strip().splitlines()[-1].startswith("error: ")
        assert message in finished.stderr
    assert not (tmp_path / "out").exists()
