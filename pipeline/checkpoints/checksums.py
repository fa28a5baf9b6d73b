"""MANIFEST.json of an output folder: size and SHA-256 of every file in it."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path, PurePosixPath

from pipeline.config import Problems

MANIFEST = "MANIFEST.json"


@dataclass(frozen=True)
class FileSum:
    """Size in bytes and SHA-256 (hexadecimal) of one file."""

    bytes: int
    sha256: str


def sum_file(path: Path) -> FileSum:
    """Reads the whole file."""
    with path.open("rb") as file:
        return FileSum(path.stat().st_size, hashlib.file_digest(file, "sha256").hexdigest())


def write_manifest(folder: Path, known: Mapping[str, FileSum], *, skip: str) -> None:
    """Writes MANIFEST.json over every file below `folder` but `skip`; those in `known` (by relative path) are not read
    again."""
    names = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
    names = [name for name in names if name not in (MANIFEST, skip)]
    sums = {name: asdict(known.get(name) or sum_file(folder / name)) for name in names}
    (folder / MANIFEST).write_text(json.dumps({"files": sums}, indent=1) + "\n", encoding="utf-8")


def read_manifest(folder: Path) -> dict[str, FileSum]:
    """What MANIFEST.json says of each file.

    Raises:
        ValueError: there is none, it is damaged, or it names a path that leaves the folder.
    """
    path = folder / MANIFEST
    if not path.is_file():
        raise ValueError(f"{folder}: {MANIFEST} is missing")
    try:
        entries = json.loads(path.read_text(encoding="utf-8"))["files"]
        sums = {str(name): FileSum(int(each["bytes"]), str(each["sha256"])) for name, each in entries.items()}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path}: damaged manifest ({error!r})") from None
    for name in sums:
        if PurePosixPath(name).is_absolute() or ".." in PurePosixPath(name).parts:
            raise ValueError(f"{path}: names {name!r}, which is not in the folder")
    return sums


def check_manifest(folder: Path) -> None:
    """Holds every file that MANIFEST.json lists against its size and its SHA-256.

    Raises:
        Problems: each file that is missing, truncated or changed; or ValueError, as `read_manifest`.
    """
    problems = []
    for name, expected in read_manifest(folder).items():
        path = folder / name
        if not path.is_file():
            problems.append(f"{folder}: {name} is missing")
        elif (size := path.stat().st_size) != expected.bytes:
            problems.append(f"{path}: has {size} bytes instead of {expected.bytes}")
        elif sum_file(path).sha256 != expected.sha256:
            problems.append(f"{path}: its content is not what was written (SHA-256 differs from {MANIFEST})")
    if problems:
        raise Problems(problems)
