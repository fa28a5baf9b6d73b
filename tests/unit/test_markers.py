"""A checkpoint counts only when its marker matches its files."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from pipeline.checkpoints.contents import content_problems
from pipeline.checkpoints.markers import (
    MARKER,
    Marker,
    complete_checkpoints,
    newest_complete,
    read_marker,
    write_complete_marker,
)


def write_checkpoint(run: Path, step: int, *, complete: bool = True) -> Path:
    folder = run / f"checkpoint-{step}"
    (folder / "global_step").mkdir(parents=True)
    (folder / "latest").write_text("global_step")
    (folder / "global_step" / "shard.pt").write_bytes(b"0123456789")
    if complete:
        write_complete_marker(folder, step=step, world_size=2, attacked=True)
    return folder


def test_marker_lists_every_file_with_its_size(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path, 7)
    found = read_marker(folder)
    assert found == Marker(7, 2, True, {"latest": 11, "global_step/shard.pt": 10}, found.sums)
    assert found.sums.keys() == found.files.keys()
    assert sorted(path.name for path in folder.iterdir()) == [MARKER, "global_step", "latest"]


def truncate(folder: Path) -> None:
    (folder / "global_step" / "shard.pt").write_bytes(b"01234")


def remove(folder: Path) -> None:
    (folder / "global_step" / "shard.pt").unlink()


def unmark(folder: Path) -> None:
    (folder / MARKER).unlink()


def tear_marker(folder: Path) -> None:
    (folder / MARKER).write_text((folder / MARKER).read_text()[:-20])


def forget_attack(folder: Path) -> None:
    fields = json.loads((folder / MARKER).read_text())
    del fields["attacked"]
    (folder / MARKER).write_text(json.dumps(fields))


def leave_folder(folder: Path) -> None:
    fields = json.loads((folder / MARKER).read_text())
    fields["files"]["../checkpoint-5/latest"] = 11
    (folder / MARKER).write_text(json.dumps(fields))


DAMAGES = {
    truncate: "global_step/shard.pt has 5 bytes instead of 10",
    remove: "global_step/shard.pt is missing",
    unmark: "COMPLETE.json is missing",
    tear_marker: "damaged marker",
    forget_attack: "damaged marker",
    leave_folder: "names '../checkpoint-5/latest', which is not in the folder",
}


@pytest.mark.parametrize("damage", DAMAGES, ids=lambda damage: damage.__name__)
def test_damaged_checkpoint_is_refused_by_name_and_passed_over(tmp_path: Path, damage: Callable[[Path], None]) -> None:
    older, newer = write_checkpoint(tmp_path, 5), write_checkpoint(tmp_path, 10)
    assert newest_complete(tmp_path) == newer
    damage(newer)
    with pytest.raises(ValueError, match=DAMAGES[damage]):
        read_marker(newer)
    assert newest_complete(tmp_path) == older


def test_contents_are_held_against_the_marker(tmp_path: Path) -> None:
    """Flipped bytes in shards, a shard of another run of the same size, a changed text: each named, none by size."""
    folder = write_checkpoint(tmp_path, 5, complete=False)
    tensors = [torch.arange(1000.0), torch.arange(1000.0) + 1]
    for name, tensor in zip(("flipped.pt", "foreign.pt"), tensors, strict=True):
        torch.save({"weights": tensor}, folder / name)
    torch.save({}, folder / "renamed.pt")
    (folder / "config.json").write_text('{"hidden_size": 64}')
    write_complete_marker(folder, step=5, world_size=2, attacked=False)
    marker = read_marker(folder)
    assert content_problems(folder, marker.sums, sorted(marker.files)) == []
    damaged = bytearray((folder / "flipped.pt").read_bytes())
    damaged[len(damaged) // 2] ^= 1
    (folder / "flipped.pt").write_bytes(damaged)
    damaged = bytearray((folder / "renamed.pt").read_bytes())
    damaged[damaged.index(b"PK\x03\x04") + 30 + 3] ^= 0x80  # the name of a record, no longer UTF-8
    (folder / "renamed.pt").write_bytes(damaged)
    torch.save({"weights": tensors[1] * 2}, folder / "foreign.pt")
    (folder / "config.json").write_text('{"hidden_size": 65}')
    read_marker(folder)
    found = content_problems(folder, marker.sums, sorted(marker.files))
    assert [each.split(": its content is not what was written")[0] for each in found] == [
        str(folder / name) for name in ("config.json", "flipped.pt", "foreign.pt", "renamed.pt")
    ]


def test_checkpoints_are_ordered_by_step_not_by_name(tmp_path: Path) -> None:
    folders = [write_checkpoint(tmp_path, step) for step in (9, 10, 100)]
    write_checkpoint(tmp_path, 200, complete=False)
    (tmp_path / "checkpoint-best").mkdir()
    (tmp_path / "checkpoint-300").write_text("a file")
    assert complete_checkpoints(tmp_path) == folders


def test_a_run_without_a_complete_checkpoint(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, 1, complete=False)
    assert newest_complete(tmp_path) is None
    assert complete_checkpoints(tmp_path / "nothing") == []
