"""The run folder before a run: whether it is free to be written, and which checkpoint a run continues from."""

from __future__ import annotations

import json
import os
from pathlib import Path

from pipeline.checkpoints.markers import newest_complete, read_marker
from pipeline.config import Problems, TrainArguments
from pipeline.training.manifest import resume_differences
from pipeline.training.prepared import Prepared, run_folder


def check_run_folder(train: TrainArguments, method_name: str) -> None:
    """Errors: ValueError if the run folder cannot be made, or holds another run and none is to be resumed."""
    folder = run_folder(train, method_name)
    there = next(each for each in (folder.absolute(), *folder.absolute().parents) if each.exists())
    if not there.is_dir():
        raise ValueError(f"--output_dir {folder}: {there} is a file: name another folder")
    if not os.access(there, os.W_OK):
        raise ValueError(f"--output_dir {folder}: {there} is not writable: name another folder")
    held = next((name for name in ("run.json", "metrics.jsonl", "checkpoint-*") if any(folder.glob(name))), None)
    if held and train.resume_from_checkpoint is None:
        raise ValueError(
            f"--output_dir {folder}: holds another run ({held}): give --resume_from_checkpoint auto, or another folder"
        )


def resume_point(run: Prepared) -> Path | None:
    """The checkpoint to continue from. None: the run starts, be it that nothing complete is there to resume, as with a
    requeued job that was killed early.

    Errors: ValueError if the checkpoint is not complete or cannot continue this run, or if --output_dir holds another.
    """
    asked = run.train.resume_from_checkpoint
    if asked is None:
        return None
    checkpoint = newest_complete(run.output_dir) if asked == "auto" else Path(asked)
    if checkpoint is not None:
        try:
            step = read_marker(checkpoint).step
        except ValueError as error:
            raise ValueError(f"--resume_from_checkpoint {error}") from error
        if step > run.steps:
            raise ValueError(
                f"--resume_from_checkpoint {asked}: {checkpoint} is at step {step}, and this run ends at {run.steps}: "
                "raise --max_steps or --num_train_epochs"
            )
    # Its own folder's record as well: the run is written there, wherever the checkpoint comes from.
    folders = {run.output_dir.resolve(): run.output_dir}
    if checkpoint is not None:
        folders[checkpoint.parent.resolve()] = checkpoint.parent
    problems = [problem for folder in folders.values() for problem in _differences(run, folder / "run.json")]
    if problems:
        raise Problems([f"--resume_from_checkpoint {asked}: {problem}" for problem in dict.fromkeys(problems)])
    return checkpoint


def _differences(run: Prepared, manifest: Path) -> list[str]:
    """What this run has otherwise than the run that wrote ``manifest``, if there is one."""
    if not manifest.exists():
        return []
    now = {
        "arguments": run.record(), "method": run.method_name, "world_size": run.world.size, "data": run.sources,
    }  # fmt: skip
    try:
        return resume_differences(json.loads(manifest.read_text(encoding="utf-8")), now)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{manifest}: not the record of a run ({error!r}): use another --output_dir") from error
