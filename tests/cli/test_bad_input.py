"""Mistakes in flags and recipes, and how the door shows all problems of a run at once."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from pipeline import door
from pipeline.config import Problems
from pipeline.door import run_door
from tests.cli.preflight import LINEAR_LAYERS, Refused, resolve
from tests.ranks import ROOT, free_port
from tests.tiny import write_jsonl

STAGE_3 = {"zero_optimization": {"stage": 3}}


def test_without_a_mistake_the_run_is_accepted_and_nothing_is_written(good_flags: list[str], tmp_path: Path) -> None:
    run = resolve(good_flags)
    assert run.steps == 30
    assert run.warnings == []
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("words", "problems"),
    [
        (["--learning_rat", "1"], ["--learning_rat is unknown; did you mean learning_rate?"]),
        (["--nosuchflag=1"], ["--nosuchflag is unknown; see --help for the list"]),
        (["--warmup_ratio", "0.1"], ["--warmup_ratio: --warmup_steps takes a share of all steps when it is below 1"]),
        (["--seed", "x"], ["--seed: invalid int value: 'x'"]),
        (["--seed"], ["--seed: expected one argument"]),
        (["--seed", "1", "2"], ["--seed: unexpected '2'"]),
        (["--bf16", "maybe"], ["--bf16: Truthy value expected: got maybe but expected one of"]),
        (["--report_to", "paper"], ["--report_to: invalid choice: 'paper' (choose from"]),
        (["--method", "nosuch"], ["--method nosuch: choose from sft, surgery"]),
        (["--method", "sft", "--alpha", "3"], ["--alpha is unknown here; it belongs to --method surgery"]),
        (
            ["--seed", "x", "--alpha", "-1", "--sink_token_position", "-2", "--learning_rat", "1"],
            [
                "--seed: invalid int value: 'x'",
                "--learning_rat is unknown; did you mean learning_rate?",
                "--alpha -1.0: the penalty's weight is a number of 0 or more",
                "--sink_token_position -2: count from 0 at the start of the text",
            ],
        ),
    ],
)
def test_flags(refused: Refused, words: list[str], problems: list[str]) -> None:
    found = refused(*words)
    assert len(found) == len(problems)
    for line, problem in zip(found, problems, strict=True):
        assert line.startswith(problem)


@pytest.mark.parametrize(
    ("recipe", "problems"),
    [
        ("seed: 1\nlearning_rat: 1\n", ["{tmp}/r.yaml:2: key learning_rat is unknown; did you mean learning_rate?"]),
        (
            "learning_rate: fast\nbf16: false\nseed: 1.5\nfoo:\n",
            [
                "{tmp}/r.yaml:1: key learning_rate: invalid float value: 'fast'",
                "{tmp}/r.yaml:3: key seed: invalid int value: '1.5'",
                "{tmp}/r.yaml:4: key foo is unknown; see --help for the list",
            ],
        ),
        ("seed: [1, 2]\n", ["{tmp}/r.yaml:1: key seed: unexpected '2'"]),
        ("seed: {a: 1}\n", ["{tmp}/r.yaml:1: key seed: invalid int value: '{\"a\": 1}'"]),
        ("seed: 1\nalpha: 3\nseed: 2\n", ["{tmp}/r.yaml:3: key seed stands on line 1 as well: remove one"]),
        ("config: other.yaml\n", ["{tmp}/r.yaml:1: key config is unknown"]),
        ("method: nosuch\n", ["--method nosuch: choose from sft, surgery"]),
        ("- seed\n", ["--config {tmp}/r.yaml: expected a mapping of flag names to values"]),
        ("", ["--config {tmp}/r.yaml: expected a mapping of flag names to values"]),
        ("seed: 1\nalpha: [\n", ["{tmp}/r.yaml:3: not valid YAML: "]),
        ("seed: \0\n", ["--config {tmp}/r.yaml: not valid YAML: "]),
    ],
)
def test_recipes(refused: Refused, tmp_path: Path, recipe: str, problems: list[str]) -> None:
    (tmp_path / "r.yaml").write_text(recipe)
    found = refused("--config", "{tmp}/r.yaml")
    assert len(found) == len(problems)
    for line, problem in zip(found, problems, strict=True):
        assert line.startswith(problem)


def test_mistakes_of_the_recipe_and_of_the_command_line_are_reported_together(
    refused: Refused, tmp_path: Path
) -> None:
    (tmp_path / "r.yaml").write_text("seed: x\n")
    assert refused("--config", "{tmp}/r.yaml", "--max_step", "3") == [
        "{tmp}/r.yaml:1: key seed: invalid int value: 'x'",
        "--max_step is unknown; did you mean max_steps?",
    ]
    assert refused("--config", "{tmp}/none.yaml") == ["--config {tmp}/none.yaml: no such file"]


SEVERAL = [
    "--ds_config", "{tmp}/ds.json", "--train_data", "{tmp}/none.jsonl", "--harmful_data", "{tmp}/rows.jsonl",
    "--eval_steps", "3", "--lora_r", "4", "--lora_target_modules", "query", "--learning_rate", "-1",
    "--output_dir", "{tmp}/held",
]  # fmt: skip
SEVERAL_PROBLEMS = {
    "--eval_steps 3 has no effect without --eval_data: leave it out",
    "--learning_rate -1.0: give 0 or more",
    "--output_dir {tmp}/held: holds another run (run.json): give --resume_from_checkpoint auto, or another folder",
    "{tmp}/ds.json:5: gradient_clippping: DeepSpeed knows no such key; did you mean gradient_clipping?",
    f"--lora_target_modules query: matches no module; {LINEAR_LAYERS}",
    "--train_data {tmp}/none.jsonl: no such file",
    "rows.jsonl:1: 'completion' is empty",
    "rows.jsonl:3: 'prompt' is missing",
}


@pytest.fixture
def several(tmp_path: Path) -> list[str]:
    """Words with eight mistakes in them, of every kind."""
    (tmp_path / "ds.json").write_text(json.dumps({**STAGE_3, "gradient_clippping": 1.0}, indent=1))
    (tmp_path / "held").mkdir()
    (tmp_path / "held" / "run.json").write_text("{}")
    rows = [{"prompt": "p", "completion": ""}, {"prompt": "p", "completion": "c"}, {"completion": "c"}]
    write_jsonl(tmp_path / "rows.jsonl", rows)
    return [word.replace("{tmp}", str(tmp_path)) for word in SEVERAL]


def test_all_problems_are_reported_together(refused: Refused, several: list[str]) -> None:
    found = refused(*several)
    assert len(found) == len(SEVERAL_PROBLEMS)
    assert set(found) == SEVERAL_PROBLEMS


def test_a_rank_speaks_only_if_rank_0_does_not(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A launcher ends the other ranks as soon as rank 0 exits; a rank that still lives has a problem of its own."""

    def main() -> None:
        raise Problems(["one", "two"])

    def shown() -> str:
        with pytest.raises(SystemExit, match="2"):
            run_door(main)
        return capsys.readouterr().err

    assert door.SILENCE >= 5
    monkeypatch.setattr(door, "SILENCE", 0)
    monkeypatch.setenv("RANK", "8")
    monkeypatch.setenv("LOCAL_RANK", "0")
    assert shown() == "error: rank 8: one\nerror: rank 8: two\n"
    monkeypatch.setenv("RANK", "0")
    assert shown() == "error: one\nerror: two\n"


def run(*command: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300, check=False)


def test_the_door_exits_with_2_and_shows_every_problem(
    good_flags: list[str], several: list[str], tmp_path: Path
) -> None:
    done = run(sys.executable, "pipeline/train.py", *good_flags, *several, "--dry_run")
    assert done.returncode == 2
    lines = done.stderr.replace(str(tmp_path), "{tmp}").splitlines()
    assert sorted(lines) == sorted(f"error: {problem}" for problem in SEVERAL_PROBLEMS)
    assert done.stdout == ""


def test_two_ranks_report_each_problem_once(good_flags: list[str], several: list[str], tmp_path: Path) -> None:
    launcher = str(Path(sys.executable).with_name("deepspeed"))
    port = ["--master_port", str(free_port())]
    done = run(launcher, "--num_gpus", "2", *port, "pipeline/train.py", *good_flags, *several)
    assert done.returncode == 2
    output = (done.stdout + done.stderr).replace(str(tmp_path), "{tmp}")
    assert "Traceback" not in output
    lines = [line for line in output.splitlines() if line.startswith("error:")]
    assert sorted(lines) == sorted(f"error: {problem}" for problem in SEVERAL_PROBLEMS)
    assert [each.name for each in (tmp_path / "held").iterdir()] == ["run.json"]
