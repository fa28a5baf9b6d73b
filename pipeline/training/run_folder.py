"""The run folder before a run: whether it is free to be written, and which checkpoint a run continues from."""

from __future__ import annotations

import json
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

from pipeline.checkpoints.folders import restore
from pipeline.checkpoints.markers import newest_complete, read_marker
from pipeline.config import Problems, TrainArguments
from pipeline.training.manifest import accumulation_on, resume_differences
from pipeline.training.prepared import Prepared, run_folder
from pipeline.training.signals import check_switches


def check_run_folder(train: TrainArguments, method_name: str) -> None:
    """Errors: ValueError if the run folder cannot be made, or holds another run and none is to be resumed."""
    folder = run_folder(train, method_name)
    there = next(each for each in (folder.absolute(), *folder.absolute().parents) if each.exists())
    if not there.is_dir():
        raise ValueError(f"--output_dir {folder}: {there} is a file: name another folder")
    if not os.access(there, os.W_OK):
        raise ValueError(f"--output_dir {folder}: {there} is not writable: name another folder")
    check_switches(folder)
    held = next((name for name in ("run.json", "metrics.jsonl", "checkpoint-*") if any(folder.glob(name))), None)
    if held and train.resume_from_checkpoint is None:
        raise ValueError(
            f"--output_dir {folder}: holds another run ({held}): give --resume_from_checkpoint auto, or another folder"
        )


def keep_global_batch(train: TrainArguments, given: set[str], method_name: str, ranks: int) -> TrainArguments:
    """With the accumulation that gives the global batch of the run to resume on this number of ranks, unless one was
    given.

    Errors: ValueError if its micro-batches do not divide by the ranks.
    """
    asked = train.resume_from_checkpoint
    if asked is None or "gradient_accumulation_steps" in given:
        return train
    folder = run_folder(train, method_name) if asked == "auto" else Path(asked).parent
    try:
        before = _read_record(folder / "run.json")
    except ValueError:
        return train  # resume_point says what is wrong with it
    if before is None:
        return train
    try:
        return replace(train, gradient_accumulation_steps=accumulation_on(before, ranks))
    except ValueError as error:
        raise ValueError(f"--resume_from_checkpoint {asked}: {error}") from error


def resume_point(run: Prepared) -> Path | None:
    """The checkpoint to continue from. None: the run starts, be it that nothing complete is there to resume, as with a
    requeued job that was killed early.

    Errors: ValueError if the checkpoint is not complete or cannot continue this run, or if --output_dir holds another.
    """
    asked = run.train.resume_from_checkpoint
    if asked is None:
        return None
    restore(run.output_dir)
    checkpoint = newest_complete(run.output_dir) if asked == "auto" else Path(asked)
    if checkpoint is not None:
        try:
            marker = read_marker(checkpoint)
        except ValueError as error:
            raise Problems([f"--resume_from_checkpoint {each}" for each in str(error).splitlines()]) from error
        if marker.step > run.steps:
            raise ValueError(
                f"--resume_from_checkpoint {asked}: {checkpoint} is at step {marker.step}, and this run ends at "
                f"{run.steps}: raise --max_steps or --num_train_epochs"
            )
        if marker.world_size != run.world.size:
            _cut_anew(run, checkpoint, marker.world_size)
    # Its own folder's record as well: the run is written there, wherever the checkpoint comes from.
    folders = {run.output_dir.resolve(): run.output_dir}
    if checkpoint is not None:
        folders[checkpoint.parent.resolve()] = checkpoint.parent
    problems = [problem for folder in folders.values() for problem in _differences(run, folder / "run.json")]
    if problems:
        raise Problems([f"--resume_from_checkpoint {asked}: {problem}" for problem in dict.fromkeys(problems)])
    return checkpoint


def _cut_anew(run: Prepared, checkpoint: Path, written_by: int) -> None:
    """Say that the shards fit another number of ranks. Errors: ValueError if they cannot be cut anew."""
    offload = run.ds_config["zero_optimization"].get("offload_optimizer") or {}
    if offload.get("device") == "nvme":
        raise ValueError(
            f"--resume_from_checkpoint: {checkpoint} was written by {written_by} ranks, and optimizer states on NVMe "
            f"cannot be cut anew for {run.world.size}: start {written_by} ranks, or offload to the CPU"
        )
    run.warnings.append(
        f"{checkpoint.name} was written by {written_by} ranks: its shards are cut anew for {run.world.size}, with "
        f"--gradient_accumulation_steps {run.train.gradient_accumulation_steps}; dropout, if any, is drawn anew"
    )


def _differences(run: Prepared, manifest: Path) -> list[str]:
    """What this run has otherwise than the run that wrote ``manifest``, if there is one."""
    before = _read_record(manifest)
    if before is None:
        return []
    now = {
        "arguments": run.record(), "method": run.method_name, "world_size": run.world.size, "data": run.sources,
    }  # fmt: skip
    return resume_differences(before, now)


def _read_record(manifest: Path) -> dict[str, Any] | None:
    """run.json of a run; None if there is none. Errors: ValueError for what is not the record of a run."""
    if not manifest.exists():
        return None
    try:
        record: dict[str, Any] = json.loads(manifest.read_text(encoding="utf-8"))
        resume_differences(record, record)  # reads all that a comparison needs
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{manifest}: not the record of a run ({error!r}): use another --output_dir") from error
    return record
