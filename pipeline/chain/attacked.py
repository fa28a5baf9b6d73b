"""The weights of attacked models in a chain's folder: where they lie, how long they are needed, and their removal.

An attacked model obeys harmful requests. It exists to be measured, so its weights go as soon as the last stage that
reads them has finished; run.json, metrics, match.json, logs and results stay.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path

from pipeline.chain.stages import Stage
from pipeline.chain.state import ChainFolder, Record
from pipeline.checkpoints.folders import unfinished


def attacked_weights(stage: Stage) -> list[Path]:
    """The attacked weights that now lie in a stage's folder, those of a half-written conversion included."""
    if not stage.attacked:
        return []
    if stage.door.weights == "checkpoints":
        return sorted(stage.folder.glob("checkpoint-*"))
    if stage.door.weights == "link":
        return [path for path in [stage.folder / "checkpoint"] if os.path.lexists(path)]
    return [path for path in (stage.folder, unfinished(stage.folder)) if os.path.lexists(path)]


def delete(stage: Stage, record: Record, folder: ChainFolder) -> None:
    """Remove a stage's attacked weights.

    The record is written first: after a kill in between nothing takes what is left for whole.
    """
    if record.finished and not record.weights_deleted:
        record.weights_deleted = True
        folder.write(record)
    for path in attacked_weights(stage):
        if path.is_symlink():
            path.unlink()
        else:
            shutil.rmtree(path)


def delete_unneeded(
    stages: Sequence[Stage], done: Collection[str], records: Mapping[str, Record], folder: ChainFolder
) -> list[str]:
    """Remove the attacked weights that no stage left to run reads; returns the names of their stages."""
    deleted = []
    for stage in stages:
        if stage.name in done and attacked_weights(stage) and all(each in done for each in readers(stage, stages)):
            delete(stage, records[stage.name], folder)
            deleted.append(stage.name)
    return deleted


def readers(stage: Stage, stages: Sequence[Stage]) -> list[str]:
    """Names of the stages that read a stage's weights, directly or through a link to them."""
    found = []
    for other in stages:
        if stage.name in other.reads and other.door.reads_weights:
            found.append(other.name)
            if other.door.weights == "link":
                found += readers(other, stages)
    return found
