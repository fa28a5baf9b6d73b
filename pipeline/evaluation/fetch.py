"""The fetch phase: fills the caches on a machine with a network, so that the other phases need none."""

from __future__ import annotations

from collections.abc import Sequence

from pipeline.config import Problems, nearest
from pipeline.evaluation.judges import MODEL_JUDGES
from pipeline.evaluation.suite import Protocol
from pipeline.evaluation.suite_sources import Source
from pipeline.evaluation.suites import SOURCES, SUITES


def fetch(suites: Sequence[str], judges: Sequence[str], protocol: Protocol) -> list[str]:
    """Downloads the data of `suites` with their judges, and the `judges`; returns a line for each.

    Raises:
        Problems: of all that could not be fetched.
    """
    judges = [each.rpartition("=")[2] for each in judges]  # as --judges has them: SUITE=NAME
    unknown = [name for name in judges if name not in MODEL_JUDGES]
    if unknown:
        raise ValueError(f"--judges {unknown[0]}: no judge that is a model{nearest(unknown[0], MODEL_JUDGES)}")
    wanted: dict[str, Source] = {name: SOURCES[name] for name in suites if name in SOURCES}
    for name in (*(SUITES[each].judge[protocol] for each in suites), *judges):
        if name in MODEL_JUDGES:
            wanted[name] = MODEL_JUDGES[name].source
    lines, problems = [], []
    for name, source in wanted.items():
        licence = SUITES[name].licence if name in SUITES else MODEL_JUDGES[name].licence
        print(f"{name}: {source} (licence: {licence}) ...", flush=True)
        try:
            lines.append(f"{name}: {source.fetch()}")
        except ValueError as error:
            problems.append(f"{name}: {error}")
    if problems:
        raise Problems(problems)
    return lines
