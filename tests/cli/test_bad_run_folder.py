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
    changed = [*resume, "--alpha", "20", "--gradient_accumulation_steps", "1"]
    differences = [
        "--resume_from_checkpoint auto: --alpha is 20.0, and the run to resume has 300.0: give the same, or another "
        "--output_dir",
        "--resume_from_checkpoint auto: --gradient_accumulation_steps is 1 on 1 ranks, and the run to resume has 1 on "
        "2: give 2, or neither the flag nor its key in --ds_config",
    ]
    assert refused(*changed) == differences
    (tmp_path / "before" / "checkpoint-5").mkdir()
    write_complete_marker(tmp_path / "before" / "checkpoint-5", step=5, world_size=2, attacked=False)
    assert refused(*changed) == differences
    assert refused(*resume, "--max_steps", "4") == [
        "--resume_from_checkpoint auto: {tmp}/before/checkpoint-5 is at step 5, and this run ends at 4: raise "
        "--max_steps or --num_train_epochs"
    ]
    (tmp_path / "before" / "run.json").write_text("{}")
    (problem,) = refused(*resume)
    assert problem.startswith("{tmp}/before/run.json: not the record of a run ")


def test_another_number_of_ranks_keeps_the_global_batch(good_flags: list[str], tmp_path: Path) -> None:
    """6 micro-batches of 4 rows: the accumulation follows the ranks, or the number of ranks is refused."""
    before = [*good_flags, "--output_dir", str(tmp_path / "before")]
    write_manifest(resolve([*before, "--gradient_accumulation_steps", "3"], ranks=2))
    for ranks, accumulation in ((1, 6), (2, 3), (3, 2), (6, 1)):
        run = resolve([*before, "--resume_from_checkpoint", "auto"], ranks=ranks)
        assert run.train.gradient_accumulation_steps == accumulation
        assert run.ds_config["gradient_accumulation_steps"] == accumulation
        assert run.ds_config["train_batch_size"] == 24
        assert run.streams["train"].layout.global_batch == 24
    with pytest.raises(
        ValueError, match="6 micro-batches do not divide over 4 ranks: start 1 or 2 or 3 or 6"
    ) as error:
        resolve([*before, "--resume_from_checkpoint", "auto"], ranks=4)
    assert "4 rows x 3 accumulation x 2 ranks" in str(error.value)


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
