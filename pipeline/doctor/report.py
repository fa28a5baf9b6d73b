"""The rows of a report as people read them, and as JSON."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from pipeline.doctor.finding import FAILED, OK, WARNING, Finding

CHECK_WIDTH = 24


@dataclass(frozen=True)
class Row:
    """A finding and where: a node ("" if unknown), and the rank that found it, None for the node as a whole."""

    node: str
    rank: int | None
    finding: Finding


def ready(rows: Sequence[Row]) -> bool:
    """Whether nothing failed."""
    return not any(row.finding.level == FAILED for row in rows)


def lines(finding: Finding, where: str = "") -> Iterator[str]:
    """One row, and its remedy below."""
    prefix = f"{where}: " if where else ""
    yield f"{finding.level:<8} {finding.check:<{CHECK_WIDTH}} {prefix}{finding.found}"
    if finding.remedy:
        yield f"{'':<8} {'':<{CHECK_WIDTH}} -> {finding.remedy}"


def verdict(rows: Sequence[Row]) -> str:
    """The last line."""
    failed, warned = (
        list(dict.fromkeys(row.finding.check for row in rows if row.finding.level == level))
        for level in (FAILED, WARNING)
    )
    if failed:
        return f"not ready: {', '.join(failed)}"
    return f"ready, with warnings: {', '.join(warned)}" if warned else "ready"


def job_lines(rows: Sequence[Row]) -> Iterator[str]:
    """All nodes' rows: what is well everywhere once, everything else by node, then a line a node and the verdict."""
    nodes = list(dict.fromkeys(row.node for row in rows if row.node))
    for check in dict.fromkeys(row.finding.check for row in rows):
        of_check = [row for row in rows if row.finding.check == check]
        trouble = [row for row in of_check if row.finding.level != OK]
        if not trouble:
            there = list(dict.fromkeys(row.node for row in of_check))
            more = f" (and {len(there) - 1} more nodes)" if len(there) > 1 else ""
            yield from lines(of_check[0].finding, f"{there[0]}{more}")
        for row in trouble:
            yield from lines(row.finding, row.node)
    yield ""
    width = max(map(len, [*nodes, "node"]))
    yield f"{'node':<{width}}  ok  warnings  failed"
    for node in nodes:
        levels = [row.finding.level for row in rows if row.node == node]
        bad = "   <- not ready" if FAILED in levels else ""
        yield f"{node:<{width}}  {levels.count(OK):>2}  {levels.count(WARNING):>8}  {levels.count(FAILED):>6}{bad}"
    yield ""
    bad_nodes = [node for node in nodes if not ready([row for row in rows if row.node == node])]
    yield verdict(rows) + (f" on {', '.join(bad_nodes)}" if bad_nodes else "")
    if bad_nodes and len(bad_nodes) < len(nodes):
        yield f"to go on without: sbatch --exclude={','.join(bad_nodes)} ..."


def written(path: Path | None, rows: Sequence[Row]) -> bool:
    """Write all rows, if there is to be a file, whole or not at all; false, the reason printed, if that failed."""
    if path is None:
        return True
    content = {
        "ready": ready(rows),
        "findings": [{"node": row.node, "rank": row.rank, **asdict(row.finding)} for row in rows],
    }
    temporary = path.with_name(f"{path.name}.tmp")
    try:
        temporary.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
        temporary.replace(path)
    except OSError as error:
        print(f"error: --json {path}: {error.strerror}", flush=True)
        return False
    return True
