"""A JSONL file that one or more workers make together, batch by batch, and that a killed run goes on with.

The batches are fixed, and batch i belongs to worker i modulo their number. Each worker appends to a file of its own,
FILE.partK; worker 0 waits until the parts hold everything, writes FILE in the order of the ids, and removes the parts.
So FILE is there whole or not at all, and holds the same bytes whoever made it and however often they were interrupted.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from pipeline.evaluation.jsonl import REMEDY, append_lines, read_lines, resume_lines, write_lines
from pipeline.evaluation.progress import Progress
from pipeline.evaluation.workers import Crew
from pipeline.report.records import parse_lines

Line = Mapping[str, Any]


def make_lines(
    path: Path,
    ids: Sequence[str],
    batches: Sequence[Sequence[int]],
    work: Callable[[Sequence[int]], Sequence[Line]],
    crew: Crew,
    *,
    label: str,
) -> None:
    """Completes `path`: one line with "id" for each of `ids`, in their order. Every worker of the crew calls it.

    Args:
        batches: indices of `ids`, each in one batch.
        work: from a batch to its lines, in the batch's order; called only for what is missing.

    Raises:
        ValueError: `path` or a part of it holds lines of other ids.
    """
    mine = path.with_name(f"{path.name}.part{crew.rank}")
    resume_lines(mine)  # cuts a torn last line off
    done = {line["id"] for line in _parts(path)}
    if path.exists():  # asked after the parts, which worker 0 removes once it has written it
        _check(path, [line["id"] for line in read_lines(path)], ids)
        if crew.main:
            _remove_parts(path)
        return
    if not done <= set(ids):
        _check(path, sorted(done), ids)
    share = [batch for i, batch in enumerate(batches) if i % crew.size == crew.rank]
    left = sum(ids[i] not in done for batch in share for i in batch)
    if left:
        total = sum(map(len, share))
        progress = Progress(
            label if crew.size == 1 else f"{label} of worker {crew.rank}", total=total, done=total - left
        )
        for batch in share:
            missing = [i for i in batch if ids[i] not in done]
            if not missing:
                continue
            # The whole batch, even if a kill left some of its lines: in low precision an answer may depend on it.
            lines = [line for line in work(batch) if line["id"] not in done]
            append_lines(mine, lines)
            progress.update(len(lines), sum(line.get("tokens", 0) for line in lines))
            crew.check()
    if crew.main:
        _merge(path, ids, crew)
    else:
        crew.wait(path.exists)


def _merge(path: Path, ids: Sequence[str], crew: Crew) -> None:
    found: dict[str, Line] = {}

    def complete() -> bool:
        found.update({line["id"]: line for line in _parts(path)})
        return all(each in found for each in ids)

    crew.wait(complete)
    write_lines(path, (found[each] for each in ids))
    _remove_parts(path)


def _remove_parts(path: Path) -> None:
    for part in path.parent.glob(f"{path.name}.part*"):
        part.unlink()


def _parts(path: Path) -> list[Line]:
    """The whole lines of all parts; a last line that is still being written, or was torn by a kill, does not count."""
    lines: list[Line] = []
    for part in sorted(path.parent.glob(f"{path.name}.part*")):
        try:
            content = part.read_bytes()
        except FileNotFoundError:  # merged by worker 0 just now
            continue
        lines += parse_lines(part, content[: content.rfind(b"\n") + 1], remedy=REMEDY)
    return lines


def _check(path: Path, found: Sequence[str], ids: Sequence[str]) -> None:
    if list(found) != list(ids):
        raise ValueError(
            f"{path}: holds {len(found)} lines of other prompts; choose another --output_dir or remove the file"
        )
