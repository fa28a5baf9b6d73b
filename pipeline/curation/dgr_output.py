"""The files of the output folder that training reads, and settings.json, which keeps two rewritings apart."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from pipeline.curation.dgr_rounds import Outcome
from pipeline.curation.dgr_sources import turn
from pipeline.data.chat import ChatEncoder
from pipeline.evaluation.jsonl import write_lines
from pipeline.evaluation.workers import Crew
from pipeline.report.records import read_json
from pipeline.training.manifest import write_json

SETTINGS, REFINED = "settings.json", "refined.jsonl"
ELSEWHERE = ("model", "adapter", "source_data")  # where they lie does not matter; what they are, their hash says


def hold_settings(folder: Path, settings: Mapping[str, Any], crew: Crew) -> None:
    """Worker 0 writes the settings, after comparing them with those an earlier run left; ranks of a launcher wait.

    Raises:
        ValueError: the folder holds another rewriting, or something else.
    """
    path = folder / SETTINGS
    if crew.main:
        if folder.exists() and not folder.is_dir():
            raise ValueError(f"--output_dir {folder}: a file; name another folder")
        if path.is_file():
            for name, now in settings.items():
                before = read_json(path).get(name)
                if name not in ELSEWHERE and before != now:
                    raise ValueError(
                        f"--output_dir {folder}: holds a rewriting with {name} {before!r}, now {now!r}; choose "
                        "another folder or remove that one"
                    )
            return
        if (folder / REFINED).exists():
            raise ValueError(f"--output_dir {folder}: its {REFINED} is of something else; name another folder")
        folder.mkdir(parents=True, exist_ok=True)
        write_json(path, settings)
    else:
        crew.wait(lambda: path.is_file() and _same(read_json(path), settings))


def write_rows(outcomes: Sequence[Outcome], encoder: ChatEncoder, fallback: str, folder: Path) -> None:
    """refined.jsonl, original.jsonl and decisions.jsonl, each whole or not at all, readable by their owner alone."""
    write_lines(folder / "original.jsonl", (_row(each, _original(each, encoder), {}) for each in outcomes))
    write_lines(folder / "decisions.jsonl", (_decision(each, fallback) for each in outcomes))
    write_lines(folder / REFINED, _refined(outcomes, encoder, fallback))


def origin(outcome: Outcome, fallback: str) -> str:
    """refined, fallback or dropped."""
    return "refined" if outcome.turn is not None else "fallback" if fallback == "original" else "dropped"


def _refined(outcomes: Sequence[Outcome], encoder: ChatEncoder, fallback: str) -> Iterator[dict[str, Any]]:
    for each in outcomes:
        if origin(each, fallback) != "dropped":
            yield _row(each, each.turn or _original(each, encoder), _decision(each, fallback))


def _row(outcome: Outcome, written: str, facts: Mapping[str, Any]) -> dict[str, Any]:
    source = outcome.source
    return {"messages": [*source.conversation(written).messages], "id": source.id, **facts}


def _original(outcome: Outcome, encoder: ChatEncoder) -> str:
    return turn(outcome.source.thought, outcome.source.answer, encoder)


def _decision(outcome: Outcome, fallback: str) -> dict[str, Any]:
    source = outcome.source
    return {
        "id": source.id,
        **({"category": source.category} if source.category else {}),
        "origin": origin(outcome, fallback),
        "tries": outcome.tries,
        "round": outcome.round,
        "strength": outcome.strength,
        "sample": outcome.sample,
        "reasons": dict(outcome.reasons),
        "nll_before": outcome.before["nll"],
        "nll_after": (outcome.after or outcome.before)["nll"],
    }


def _same(before: Mapping[str, Any], now: Mapping[str, Any]) -> bool:
    return all(name in ELSEWHERE or before.get(name) == value for name, value in now.items())
