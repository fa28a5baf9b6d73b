"""Completeness markers: a checkpoint folder counts only when its COMPLETE.json, written last, matches its files.

DeepSpeed's `latest` file can name a checkpoint whose shards were never finished (a killed job, a full disk), so
neither resume nor conversion trusts it.
"""

from __future__ import annotations

import json
import os
import re
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from pipeline.checkpoints.contents import content_sum
from pipeline.config import Problems

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
        sums: what their contents were (`contents.content_sum`); empty in a marker of an earlier version.
    """

    step: int
    world_size: int
    attacked: bool
    files: dict[str, int]
    sums: dict[str, int]


def write_complete_marker(folder: Path, *, step: int, world_size: int, attacked: bool) -> None:
    """Writes COMPLETE.json with the size and the content's sum of all files under `folder`. One rank calls it, after a
    barrier."""
    files = _file_sizes(folder)
    sums = {name: content_sum(folder / name) for name in files}
    marker = {"step": step, "world_size": world_size, "attacked": attacked, "files": files, "sums": sums}
    temporary = folder / f"{MARKER}.tmp"
    with temporary.open("w", encoding="utf-8") as file:
        json.dump(marker, file, indent=1)
        file.write("\n")
        file.flush()
        os.fsync(file.fileno())
    temporary.rename(folder / MARKER)


def read_marker(folder: Path) -> Marker:
    """Reads COMPLETE.json and compares every file it lists with the folder, by size (`contents.content_problems` reads
    them whole).

    Raises:
        ValueError: no readable marker; or Problems, with each file that is missing or of another size.
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
            sums={str(name): int(each) for name, each in fields.get("sums", {}).items()},
        )
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path}: damaged marker ({error!r}); use another checkpoint-N folder") from None
    problems = []
    for name, size in marker.files.items():
        file = folder / name
        if PurePosixPath(name).is_absolute() or ".." in PurePosixPath(name).parts:
            problems.append(f"{path}: names {name!r}, which is not in the folder; use another checkpoint-N folder")
        elif not file.is_file():
            problems.append(f"{folder}: {name} is missing; use another checkpoint-N folder")
        elif (found := file.stat().st_size) != size:
            problems.append(f"{folder}: {name} has {found} bytes instead of {size}; use another checkpoint-N folder")
    if problems:
        raise Problems(problems)
    return marker


def complete_checkpoints(run_folder: Path) -> list[Path]:
    """The complete `checkpoint-N` folders of a run, by ascending N."""
    steps = {}
    for folder in run_folder.glob("checkpoint-*"):
        match = CHECKPOINT_NAME.fullmatch(folder.name)
        if match and folder.is_dir() and is_complete(folder):
            steps[int(match[1])] = folder
    return [steps[step] for step in sorted(steps)]


def newest_complete(run_folder: Path) -> Path | None:
    """The complete checkpoint of the highest step, None when there is none."""
    checkpoints = complete_checkpoints(run_folder)
    return checkpoints[-1] if checkpoints else None


def is_complete(folder: Path) -> bool:
    """Its marker is there and matches its files."""
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
