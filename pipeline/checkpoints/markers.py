"""Completeness markers: a checkpoint folder counts only when its COMPLETE.json, written last, matches its files.

DeepSpeed's `latest` file can name a checkpoint whose shards were never finished (a killed job, a full disk), so
neither resume nor conversion trusts it.
"""

from __future__ import annotations

import json
import os
import re
from dataclasses import dataclass
from pathlib import Path

MARKER = "COMPLETE.json"
CHECKPOINT_NAME = re.compile(r"checkpoint-(\d+)")


@dataclass(frozen=True)
class Marker:
    """Contents of COMPLETE.json.

    Attributes:
        step: optimizer steps done.
        world_size: ranks that wrote shards.
        attacked: the run trained on --attack_data.
        files: size in bytes of every file of the folder, by its path relative to it.
    """

    step: int
    world_size: int
    attacked: bool
    files: dict[str, int]


def write_complete_marker(folder: Path, *, step: int, world_size: int, attacked: bool) -> None:
    """Writes COMPLETE.json with the sizes of all files under `folder`. One rank calls it, after a barrier."""
    files = _file_sizes(folder)
    marker = {"step": step, "world_size": world_size, "attacked": attacked, "files": files}
    temporary = folder / f"{MARKER}.tmp"
    with temporary.open("w", encoding="utf-8") as file:
        json.dump(marker, file, indent=1)
        file.write("\n")
        file.flush()
        os.fsync(file.fileno())
    temporary.rename(folder / MARKER)


def read_marker(folder: Path) -> Marker:
    """Reads COMPLETE.json and compares every file it lists with the folder.

    Raises:
        ValueError: no readable marker, or a file that is missing or of another size, by name.
    """
    path = folder / MARKER
    if not path.is_file():
        raise ValueError(f"{folder}: not a complete checkpoint ({MARKER} is missing); use another checkpoint-N folder")
    try:
        fields = json.loads(path.read_text(encoding="utf-8"))
        marker = Marker(
            step=int(fields["step"]),
            world_size=int(fields["world_size"]),
            attacked=bool(fields["attacked"]),
            files={str(name): int(size) for name, size in fields["files"].items()},
        )
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path}: damaged marker ({error!r}); use another checkpoint-N folder") from None
    for name, size in marker.files.items():
        file = folder / name
        if not file.is_file():
            raise ValueError(f"{folder}: {name} is missing; use another checkpoint-N folder")
        if file.stat().st_size != size:
            raise ValueError(
                f"{folder}: {name} has {file.stat().st_size} bytes instead of {size}; use another checkpoint-N folder"
            )
    return marker


def complete_checkpoints(run_folder: Path) -> list[Path]:
    """The complete `checkpoint-N` folders of a run, by ascending N."""
    steps = {}
    for folder in run_folder.glob("checkpoint-*"):
        match = CHECKPOINT_NAME.fullmatch(folder.name)
        if match and folder.is_dir() and _is_complete(folder):
            steps[int(match[1])] = folder
    return [steps[step] for step in sorted(steps)]


def newest_complete(run_folder: Path) -> Path | None:
    """The complete checkpoint of the highest step, None when there is none."""
    checkpoints = complete_checkpoints(run_folder)
    return checkpoints[-1] if checkpoints else None


def _is_complete(folder: Path) -> bool:
    try:
        read_marker(folder)
    except ValueError:
        return False
    return True


def _file_sizes(folder: Path) -> dict[str, int]:
    skipped = {MARKER, f"{MARKER}.tmp"}
    paths = sorted(path for path in folder.rglob("*") if path.is_file())
    sizes = {path.relative_to(folder).as_posix(): path.stat().st_size for path in paths}
    return {name: size for name, size in sizes.items() if name not in skipped}
