"""What a selection leaves: scores, the kept rows as they were stored, and the report. All of it or nothing."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from pipeline.checkpoints.folders import PARTIAL
from pipeline.curation.baselines import loss_scores
from pipeline.curation.pharmacist_method import Pharmacist
from pipeline.curation.pharmacist_settings import PharmacistArguments
from pipeline.curation.selection import (
    Flags,
    Floats,
    auc,
    auc_difference,
    auc_interval,
    kept_rows,
    ranks,
    spearman,
)
from pipeline.data.rows import Row, bad_rows
from pipeline.data.sources import read_rows
from pipeline.report.intervals import wilson
from pipeline.report.selection_page import write_page
from pipeline.training.manifest import commit, versions, write_json
from pipeline.training.prepared import Prepared

PHARMACIST = "pharmacist"  # its name among the selectors
TRUTHS = {"true": True, "1": True, "false": False, "0": False}  # CSV has no booleans


@dataclass(frozen=True)
class Alignment:
    """The rows to choose from, as stored, with what is known of each."""

    rows: list[Row]
    categories: list[str | None]
    planted: Flags | None

    @classmethod
    def read(cls, prepared: Prepared, asked: PharmacistArguments) -> Alignment:
        """Errors: ValueError for rows whose --planted_key is no truth value, and if too few rows would be kept."""
        rows = read_rows(prepared.data.train_data, flag="train_data")
        pool = prepared.streams["train"].pool
        assert [each.id for each in rows] == [pool.row_id(i) for i in range(len(pool))]
        kept_rows(np.zeros(len(rows)), asked.keep_ratio)
        planted = _planted(rows, asked.planted_key) if asked.planted_key else None
        return cls(rows, [_category(each.fields.get(asked.category_key)) for each in rows], planted)


def _planted(rows: list[Row], key: str) -> Flags:
    found = [TRUTHS.get(str(each.fields.get(key)).lower()) for each in rows]
    if problems := [
        f"{row.id}: --planted_key {key}: {row.fields.get(key)!r} is there, expected true or false"
        for row, value in zip(rows, found, strict=True)
        if value is None
    ]:
        raise bad_rows(problems)
    planted = np.array(found, dtype=np.bool_)
    if planted.all() or not planted.any():
        raise ValueError(f"--planted_key {key}: it is {found[0]} in every row: plant some and leave some, or drop it")
    return planted


def _category(value: Any) -> str | None:
    """A row's category: text, or the keys of a mapping that are true (BeaverTails)."""
    if isinstance(value, Mapping):
        return ", ".join(sorted(key for key, true in value.items() if true)) or "none"
    return None if value is None else str(value)


def write(alignment: Alignment, run: Prepared, method: Pharmacist, seal: Pharmacist | None, out: Path) -> None:
    """The output folder, beside its place and then renamed into it. Errors: OSError, which leaves nothing."""
    asked = method.config
    scores = selector_scores(method, seal)
    kept = {name: kept_rows(each, asked.keep_ratio) for name, each in scores.items()}
    if "full" in asked.baselines:
        kept["full"] = np.ones(len(alignment.rows), dtype=np.bool_)
    lines = list(_score_lines(alignment, run, method, scores, kept[PHARMACIST]))
    report = {
        "arguments": asdict(run.model) | asdict(asked), "data": run.sources, "world_size": run.world.size,
        "versions": versions(), "commit": commit(), "warnings": run.warnings,
        "selectors": {name: _selector(name, scores, kept, lines, alignment.planted) for name in kept},
        "correlations": _correlations(lines),
        "categories": list(_categories(alignment, kept[PHARMACIST])),
        "toxic_increment": method.toxic, "steps": method.history,
    }  # fmt: skip
    folder = out.with_name(out.name + PARTIAL)
    shutil.rmtree(folder, ignore_errors=True)  # what a killed run left
    out.parent.mkdir(parents=True, exist_ok=True)
    folder.mkdir()
    try:
        _write_lines(folder / "scores.jsonl", lines)
        for name, mask in kept.items():
            file = folder / ("kept.jsonl" if name == PHARMACIST else f"baselines/{name}.jsonl")
            file.parent.mkdir(exist_ok=True)
            _write_lines(file, (row.fields for row, keep in zip(alignment.rows, mask, strict=True) if keep))
        write_page(report, lines, folder)
        write_json(folder / "report.json", report)
        folder.replace(out)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def selector_scores(method: Pharmacist, seal: Pharmacist | None) -> dict[str, Floats]:
    """Scores [N] by selector, Pharmacist's first. The full set has none."""
    scores: dict[str, Floats] = {PHARMACIST: method.selector.scores().numpy()}
    for name in method.config.baselines:
        if name == "seal" and seal is not None:
            scores[name] = seal.selector.scores().numpy()
        elif name == "gradient_cosine" and method.cosines is not None:
            scores[name] = method.cosines
        elif name != "full":
            scores[name] = loss_scores(name, method.first_losses, method.config.seed)
    return scores


def _score_lines(
    alignment: Alignment, run: Prepared, method: Pharmacist, scores: Mapping[str, Floats], kept: Flags
) -> Iterable[dict[str, Any]]:
    place, weights, pool = ranks(scores[PHARMACIST]), method.selector.weights(), run.streams["train"].pool
    for i, row in enumerate(alignment.rows):
        line = {
            "id": row.id, "row": i + 1, "score": float(scores[PHARMACIST][i]), "rank": int(place[i]),
            "weight": float(weights[i]), "kept": bool(kept[i]), "first_loss": float(method.first_losses[i]),
            "last_loss": float(method.last_losses[i]), "tokens": int(pool.trained[i]),
        }  # fmt: skip
        if alignment.categories[i] is not None:
            line["category"] = alignment.categories[i]
        if alignment.planted is not None:
            line["planted"] = bool(alignment.planted[i])
        if len(scores) > 1:
            line["baselines"] = {name: float(each[i]) for name, each in scores.items() if name != PHARMACIST}
        yield line


def _selector(
    name: str,
    scores: Mapping[str, Floats],
    kept: Mapping[str, Flags],
    lines: list[dict[str, Any]],
    planted: Flags | None,
) -> dict[str, Any]:
    """Means over the rows that a selector keeps; shared: how many of them Pharmacist keeps too."""
    mask = kept[name]
    means = {
        key: float(np.array([line[key] for line in lines])[mask].mean())
        for key in ("first_loss", "last_loss", "tokens")
    }
    found: dict[str, Any] = {"kept": int(mask.sum()), "shared": int((mask & kept[PHARMACIST]).sum()), "means": means}
    if planted is None:
        return found
    found["planted_kept"] = int((mask & planted).sum())
    if name in scores:
        value = auc(scores[name], planted)
        low, high = auc_interval(value, int((~planted).sum()), int(planted.sum()))
        found["auc"] = {"value": value, "low": low, "high": high}
    if name in scores and name != PHARMACIST and planted.sum() > 1 and (~planted).sum() > 1:
        value, low, high = auc_difference(scores[PHARMACIST], scores[name], planted)
        found["pharmacist_auc_less_this"] = {"value": value, "low": low, "high": high}
    return found


def _correlations(lines: list[dict[str, Any]]) -> dict[str, float | None]:
    """Spearman's correlation of the score with each measure of the rows."""
    score = np.array([line["score"] for line in lines])
    return {
        key: spearman(score, np.array([line[key] for line in lines], dtype=np.float64))
        for key in ("first_loss", "last_loss", "tokens")
    }


def _categories(alignment: Alignment, kept: Flags) -> Iterable[dict[str, Any]]:
    known = sorted({each for each in alignment.categories if each is not None})
    for name in known:
        mask = np.array([each == name for each in alignment.categories])
        k, n = int(kept[mask].sum()), int(mask.sum())
        low, high = wilson(k, n)
        yield {"category": name, "rows": n, "kept": k, "low": low, "high": high}


def _write_lines(path: Path, lines: Iterable[Mapping[str, Any]]) -> None:
    with path.open("w", encoding="utf-8") as file:
        for line in lines:
            file.write(json.dumps(line, ensure_ascii=False, default=str) + "\n")
