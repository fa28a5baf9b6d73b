"""What a checkpoint's marker remembers of its files' contents: next to nothing to compute, whole files to check.

A file of torch.save is a zip, whose directory lists the CRC-32 of every record: a checksum of that directory stands
for the whole content. So a marker costs a few kilobytes of reading a shard, and a flipped byte, or a shard of another
run with the same size, is still found.
"""

from __future__ import annotations

import zipfile
import zlib
from collections.abc import Iterable, Mapping
from pathlib import Path

_PIECE = 1 << 20


def content_sum(path: Path) -> int:
    """CRC-32 of a zip's directory (names, sizes and CRC-32 of its records); of all bytes of any other file."""
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            records = [(entry.filename, entry.file_size, entry.CRC) for entry in archive.infolist()]
        return zlib.crc32(repr(records).encode())
    total = 0
    with path.open("rb") as file:
        while piece := file.read(_PIECE):
            total = zlib.crc32(piece, total)
    return total


def content_problems(folder: Path, sums: Mapping[str, int], names: Iterable[str]) -> list[str]:
    """Reads the named files of `folder` whole and holds them against `sums`; a message for each that differs."""
    problems = []
    for name in names:
        if name in sums and not _is_what_was_written(folder / name, sums[name]):
            problems.append(
                f"{folder / name}: its content is not what was written (damaged, or of another run); use another "
                "checkpoint-N folder"
            )
    return problems


def _is_what_was_written(path: Path, wanted: int) -> bool:
    try:
        if content_sum(path) != wanted:
            return False
        if zipfile.is_zipfile(path):
            with zipfile.ZipFile(path) as archive:
                return archive.testzip() is None
    except Exception:  # a damaged zip fails in many ways, by a name that is not UTF-8 too
        return False
    return True
