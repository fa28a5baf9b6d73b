"""Run folders and checkpoints that belong to another run are left alone."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from pipeline.checkpoints.markers import write_complete_marker
from pipeline.training.run import write_manifest
from tests.cli.preflight import Refused, resolve


@pytest.mark.parametrize("held", ["run.json", "metrics.jsonl", "checkpoint-3/COMPLETE.json"])
def test_an_output_folder_that_holds_another_run(refused: Refused, tmp_path: Path, held: str) -> None:
    file = tmp_path / "held" / held
    file.parent.mkdir(parents=True)
    file.write_text("{}")
    (problem,) = refused("--output_dir", "{tmp}/held")
    assert re.fullmatch(
        r"--output_dir \{tmp\}/held: holds another run \(\S+\): give --resume_from_checkpoint auto, or another folder",
        problem,
    )
    assert [each for each in (tmp_path / "held").rglob("*") if each.is_file()] == [file]
    assert file.read_text() == "{}"


def test_an_output_folder_that_cannot_be_made(refused: Refused, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for name in ("{tmp}/file", "{tmp}/file/below"):
        assert refused("--output_dir", name) == [f"--output_dir {name}: {{tmp}}/file is a file: name another folder"]
    (problem,) = set(refused("--cache_dir", "{tmp}/file"))
    assert problem.startswith("--cache_dir {tmp}/file: ")
    assert problem.endswith("name a folder that can be written")


def test_a_checkpoint_that_cannot_be_resumed(refused: Refused, good_flags: list[str], tmp_path: Path) -> None:
    assert refused("--resume_from_checkpoint", "{tmp}/none") == [
        "--resume_from_checkpoint {tmp}/none: not a complete checkpoint (COMPLETE.json is missing); use another "
        "checkpoint-N folder"
    ]
    write_manifest(resolve([*good_flags, "--output_dir", str(tmp_path / "before")], ranks=2))
    resume = ["--output_dir", "{tmp}/before", "--resume_from_checkpoint", "auto"]
    differences = [
        "--resume_from_checkpoint auto: --alpha is 20.0, and the run to resume has 300.0: give the same, or another "
        "--output_dir",
        "--resume_from_checkpoint auto: the run to resume had 2 ranks, and this one has 1: start as many",
    ]
    assert refused(*resume, "--alpha", "20") == differences
    (tmp_path / "before" / "checkpoint-5").mkdir()
    write_complete_marker(tmp_path / "before" / "checkpoint-5", step=5, world_size=2, attacked=False)
    assert refused(*resume, "--alpha", "20") == differences
    assert refused(*resume, "--max_steps", "4") == [
        "--resume_from_checkpoint auto: {tmp}/before/checkpoint-5 is at step 5, and this run ends at 4: raise "
        "--max_steps or --num_train_epochs"
    ]
    (tmp_path / "before" / "run.json").write_text("{}")
    (problem,) = refused(*resume)
    assert problem.startswith("{tmp}/before/run.json: not the record of a run ")


def test_a_checkpoint_is_not_resumed_into_the_folder_of_a_third_run(
    refused: Refused, good_flags: list[str], tmp_path: Path
) -> None:
    for name, alpha in (("one", "300"), ("two", "20")):
        write_manifest(resolve([*good_flags, "--output_dir", str(tmp_path / name), "--alpha", alpha]))
    (tmp_path / "one" / "checkpoint-5").mkdir()
    write_complete_marker(tmp_path / "one" / "checkpoint-5", step=5, world_size=1, attacked=False)
    assert refused("--output_dir", "{tmp}/two", "--resume_from_checkpoint", "{tmp}/one/checkpoint-5") == [
        "--resume_from_checkpoint {tmp}/one/checkpoint-5: --alpha is 300.0, and the run to resume has 20.0: give the "
        "same, or another --output_dir"
    ]
