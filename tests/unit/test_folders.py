"""A process may die between any two steps of saving and deleting: what was complete stays, nothing else counts."""

from __future__ import annotations

from pathlib import Path

import pytest

from pipeline.checkpoints.folders import leftovers, partial, prune, publish, restore
from pipeline.checkpoints.markers import complete_checkpoints, newest_complete, write_complete_marker
from pipeline.checkpoints.space import require_space


def write(folder: Path, content: str = "1") -> Path:
    """A complete checkpoint, wherever it lies."""
    folder.mkdir(parents=True)
    (folder / "shard.pt").write_text(content)
    write_complete_marker(folder, step=1, world_size=1, attacked=False)
    return folder


def names(run: Path) -> list[str]:
    return sorted(each.name for each in run.iterdir())


def test_a_checkpoint_counts_from_its_rename_on(tmp_path: Path) -> None:
    final = tmp_path / "checkpoint-4"
    write(partial(final))
    assert newest_complete(tmp_path) is None
    assert leftovers(tmp_path) == [partial(final)]
    publish(final)
    assert complete_checkpoints(tmp_path) == [final]
    assert names(tmp_path) == ["checkpoint-4"]


def test_a_checkpoint_of_the_same_step_is_replaced(tmp_path: Path) -> None:
    final = write(tmp_path / "checkpoint-4", "old")
    write(partial(final), "new")
    publish(final)
    assert (final / "shard.pt").read_text() == "new"
    assert names(tmp_path) == ["checkpoint-4"]


def test_a_replacement_killed_between_its_renames_is_undone(tmp_path: Path) -> None:
    final = write(tmp_path / "checkpoint-4", "old")
    write(partial(final), "new")
    final.rename(tmp_path / "checkpoint-4.old")
    for _ in range(2):  # every rank does it
        restore(tmp_path)
        assert newest_complete(tmp_path) == final
    assert (final / "shard.pt").read_text() == "old"
    assert leftovers(tmp_path) == [partial(final)]


def test_what_is_half_deleted_is_not_brought_back(tmp_path: Path) -> None:
    write(tmp_path / "checkpoint-2.old")
    (tmp_path / "checkpoint-2.old" / "shard.pt").unlink()
    write(tmp_path / "checkpoint-4", "newer")
    write(tmp_path / "checkpoint-4.old", "older")
    restore(tmp_path)
    assert complete_checkpoints(tmp_path) == [tmp_path / "checkpoint-4"]
    assert (tmp_path / "checkpoint-4" / "shard.pt").read_text() == "newer"
    assert [each.name for each in leftovers(tmp_path)] == ["checkpoint-2.old", "checkpoint-4.old"]


def test_the_checkpoint_just_written_is_kept_even_below_later_ones(tmp_path: Path) -> None:
    """A run that went back to step 2 and writes step 4, while step 8 of its first attempt is still there."""
    for step in (2, 4, 8):
        write(tmp_path / f"checkpoint-{step}")
    prune(tmp_path, keep=1, newest=tmp_path / "checkpoint-4")
    assert names(tmp_path) == ["checkpoint-4", "checkpoint-8"]


def test_a_disk_without_room_names_both_figures(tmp_path: Path) -> None:
    require_space(tmp_path / "not" / "there", 1, flag="--output_dir", what="a checkpoint")
    with pytest.raises(
        ValueError, match=r"--output_dir .*/run: a checkpoint takes 1048576\.0 GiB, and \d+\.\d GiB are"
    ):
        require_space(tmp_path / "run", 2**50, flag="--output_dir", what="a checkpoint")
