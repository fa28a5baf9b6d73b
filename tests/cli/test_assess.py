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


def test_two_workers_give_the_same_files(words: list[str | Path], tmp_path: Path) -> None:
    """Two processes that --num_workers starts, and two ranks of a launcher."""
    words[-3:] = ["8", "--max_new_tokens", "4"]
    one, two, ranked = tmp_path / "one", tmp_path / "two", tmp_path / "ranked"
    for out, extra in ((one, []), (two, ["--num_workers", "2"])):
        finished = assess(*words, *extra, "--output_dir", out)
        assert finished.returncode == 0, finished.stderr
    ranks = [
        subprocess.Popen(
            command(*words, "--output_dir", ranked),
            cwd=ROOT,
            env={**os.environ, "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2"},
            stdout=subprocess.DEVNULL,
        )
        for rank in (1, 0)
    ]
    assert [rank.wait(timeout=240) for rank in ranks] == [0, 0]
    names = sorted(path.name for path in one.iterdir())
    for out in (two, ranked):
        assert sorted(path.name for path in out.iterdir()) == names
        for name in names:
            assert (out / name).read_bytes() == (one / name).read_bytes(), name


def test_console_shows_scores_and_no_answer(words: list[str | Path], tmp_path: Path) -> None:
    words[words.index("--batch_size") + 1] = "110"
    finished = assess(*words, "--output_dir", tmp_path, "--show_text")  # shows nothing but on a terminal
    assert finished.returncode == 0, finished.stderr
    assert "warning: --show_text" in finished.stdout
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
    ):
        finished = assess(*words, "--output_dir", tmp_path / "out", *extra)
        assert finished.returncode == 2
        assert finished.stderr.strip().splitlines()[-1].startswith("error: ")
        assert message in finished.stderr
    assert not (tmp_path / "out").exists()


def test_a_release_gate_ends_with_its_own_exit_code_and_stands_in_the_results(
    words: list[str | Path], tmp_path: Path
) -> None:
    words[words.index("--batch_size") + 1] = "110"
    words += ["--output_dir", tmp_path, "--fail_if", "harmful_score>100"]
    failed = assess(*words, "policy.accuracy<=100")
    assert failed.returncode == 3, failed.stderr
    assert "gate failed: policy.accuracy<=100: holds" in failed.stdout
    gate = json.loads((tmp_path / "results.json").read_text())["gate"]
    assert [each["failed"] for each in gate] == [False, True]
    assert "Release gate failed" in (tmp_path / "report.html").read_text(encoding="utf-8")
    assert (tmp_path / "model_card.md").is_file()
    passed = assess(*words)  # nothing is generated again
    assert passed.returncode == 0, passed.stderr
    assert "Release gate passed" in (tmp_path / "report.html").read_text(encoding="utf-8")
    refused = assess(*words, "acuracy<90")
    assert refused.returncode == 2
    assert "did you mean accuracy?" in refused.stderr
