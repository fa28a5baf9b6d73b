"""Which row of a comparison is whose control: a defense, plain training, and plain training stopped at its loss."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from pipeline.report.comparison import Row


@dataclass
class Trial:
    """A defense under one attack. plain: the row of the whole run that the controls were taken from, if it is one."""

    defense: Row
    plain: Row | None
    controls: list[Row] = field(default_factory=list)


def trials(rows: Sequence[Row]) -> list[Trial]:
    """The rows that have controls, in the order of the controls: a row with a match is the control of the row whose
    run or assessment the match was made with. In a sweep the three stand under one condition."""
    runs: dict[tuple[str | None, str], Row] = {}
    for row in rows:
        for folder in [*row.folders.get("run", []), *row.folders["assess"]] if not row.matches else []:
            runs.setdefault((row.condition, folder.name), row)
    found: dict[str, Trial] = {}
    for control in rows:
        for match in control.matches[:1]:
            if (defense := runs.get((control.condition, match.like))) is not None:
                trial = found.setdefault(defense.name, Trial(defense, runs.get((control.condition, match.run))))
                trial.controls.append(control)
    return list(found.values())
