"""The loss-matched control: which checkpoint is taken, and what is said about how well it matches."""

from __future__ import annotations

from pathlib import Path

import pytest

from pipeline.report.match import match_checkpoint, read_match
from tests.runs import METRIC, write_run


def test_the_checkpoint_nearest_to_the_other_runs_final_loss_is_taken(tmp_path: Path) -> None:
    sft = write_run(tmp_path / "sft", {0: 4.0, 2: 3.0, 4: 2.2, 6: 1.9, 8: 1.0}, saved=[2, 4, 6, 8])
    surgery = write_run(tmp_path / "surgery", {0: 4.0, 4: 3.0, 8: 2.0})
    match = match_checkpoint(sft, surgery, METRIC, tmp_path / "control")
    assert match.step == 6
    assert (match.value, match.target) == (1.9, 2.0)
    assert match.gap == pytest.approx(-0.1)
    assert match.bracket == [(6, 1.9), (4, 2.2)]
    assert match.in_range
    assert (tmp_path / "control/checkpoint").resolve() == sft / "checkpoint-6"
    assert "sft at step 6" in match.sentence()
    assert "OUTSIDE" not in match.sentence()


def test_the_link_still_leads_to_the_checkpoint_after_all_folders_moved_together(tmp_path: Path) -> None:
    sft = write_run(tmp_path / "here/sft", {2: 3.0}, saved=[2])
    match_checkpoint(sft, sft, METRIC, tmp_path / "here/control")
    (tmp_path / "here").rename(tmp_path / "there")
    assert (tmp_path / "there/control/checkpoint/config.json").read_text() == "{}"
    assert str(tmp_path) not in (tmp_path / "there/control/match.json").read_text()


@pytest.mark.parametrize(("target", "step"), [(0.5, 4), (9.0, 2)])
def test_a_target_outside_what_was_saved_takes_the_nearest_end_and_says_so(
    tmp_path: Path, target: float, step: int
) -> None:
    # Step 0 has a fitting loss, but no checkpoint.
    sft = write_run(tmp_path / "sft", {0: 9.0, 2: 3.0, 4: 1.0}, saved=[2, 4])
    other = write_run(tmp_path / "surgery", {4: target})
    match = match_checkpoint(sft, other, METRIC, tmp_path / "control")
    assert match.step == step
    assert not match.in_range
    assert [each for each, _ in match.bracket] == [step]
    assert "OUTSIDE the range" in match.sentence()
    assert "OUTSIDE the range" in read_match(tmp_path / "control").sentence()


def test_a_model_that_was_assessed_has_a_control_too(tmp_path: Path) -> None:
    sft = write_run(tmp_path / "sft", {2: 3.0, 4: 1.0}, saved=[2, 4])
    repaired = tmp_path / "repaired"
    repaired.mkdir()
    (repaired / "results.json").write_text('{"losses": {"poisoned": {"value": 2.9}}}')
    match = match_checkpoint(sft, repaired, METRIC, tmp_path / "control")
    assert (match.step, match.target, match.like) == (2, 2.9, "repaired")
    (repaired / "results.json").write_text('{"losses": {"benign": {"value": 2.9}}}')
    with pytest.raises(ValueError, match=r"no loss for eval_poisoned_loss; it has \['eval_benign_loss'\]"):
        match_checkpoint(sft, repaired, METRIC, tmp_path / "control")


def test_of_two_equally_near_checkpoints_the_earlier_is_taken(tmp_path: Path) -> None:
    sft = write_run(tmp_path / "sft", {2: 3.0, 4: 1.0}, saved=[2, 4])
    other = write_run(tmp_path / "surgery", {4: 2.0})
    assert match_checkpoint(sft, other, METRIC, tmp_path / "control").step == 2


def test_a_half_written_checkpoint_is_no_candidate(tmp_path: Path) -> None:
    sft = write_run(tmp_path / "sft", {2: 3.0, 4: 1.0}, saved=[2, 4])
    (sft / "checkpoint-4/config.json").write_text("{")  # shorter than its marker says
    other = write_run(tmp_path / "surgery", {4: 1.0})
    assert match_checkpoint(sft, other, METRIC, tmp_path / "control").step == 2


def test_a_second_match_replaces_the_first(tmp_path: Path) -> None:
    sft = write_run(tmp_path / "sft", {2: 3.0, 4: 1.0}, saved=[2, 4])
    for step, target in ((2, 3.0), (4, 1.0)):
        other = write_run(tmp_path / f"other{step}", {4: target})
        match_checkpoint(sft, other, METRIC, tmp_path / "control")
        assert (tmp_path / "control/checkpoint").resolve() == sft / f"checkpoint-{step}"
        assert read_match(tmp_path / "control").step == step


def test_errors_name_what_is_missing_and_write_nothing(tmp_path: Path) -> None:
    sft = write_run(tmp_path / "sft", {0: 4.0, 3: 3.0}, saved=[2])
    with pytest.raises(ValueError, match=r"saved at \[2\], evaluated at \[0, 3\]; train with --save_steps"):
        match_checkpoint(sft, sft, METRIC, tmp_path / "control")
    with pytest.raises(ValueError, match=r"eval_benign_loss was never logged; it has eval_poisoned_loss"):
        match_checkpoint(sft, sft, "eval_benign_loss", tmp_path / "control")
    with pytest.raises(ValueError, match=r"metrics.jsonl: no such file"):
        match_checkpoint(sft, tmp_path / "nowhere", METRIC, tmp_path / "control")
    broken = write_run(tmp_path / "broken", {2: float("nan")}, saved=[2])
    with pytest.raises(ValueError, match=r"eval_poisoned_loss is nan at step 2"):
        match_checkpoint(broken, sft, METRIC, tmp_path / "control")
    assert not (tmp_path / "control").exists()
