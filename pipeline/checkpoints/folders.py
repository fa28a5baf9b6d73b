"""The checkpoint folders of a run: written beside their place, renamed into it, and renamed out of it before deletion.

    checkpoint-8.partial    being written, or left by a save that was killed
    checkpoint-8            complete since the rename (its marker was written before)
    checkpoint-8.old        on its way out: being deleted, or replaced by another checkpoint of the same step

Only the middle one is ever taken for a checkpoint, so a process may die at any point.
"""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from pipeline.checkpoints.markers import complete_checkpoints, is_complete

PARTIAL, OLD = ".partial", ".old"


def unfinished(out: Path) -> Path:
    """Where a folder of converted weights is made, and what a killed conversion leaves of it."""
    return out.with_name(f".{out.name}.partial")


def partial(final: Path) -> Path:
    """Where a checkpoint is written until it is complete."""
    return final.with_name(final.name + PARTIAL)


def publish(final: Path) -> None:
    """Puts the complete `partial(final)` in its place; a checkpoint that is there already goes after that."""
    if final.exists():
        final.rename(_old(final))
    partial(final).rename(final)
    sync(final.parent)
    shutil.rmtree(_old(final), ignore_errors=True)


def prune(run_folder: Path, *, keep: int, newest: Path) -> None:
    """Deletes the complete checkpoints of a run but the `keep` of the highest steps and `newest`, the one just written
    (a run that went back to an earlier checkpoint writes below the steps that are there)."""
    for folder in complete_checkpoints(run_folder)[:-keep]:
        if folder != newest:
            folder.rename(_old(folder))
            shutil.rmtree(_old(folder), ignore_errors=True)


def restore(run_folder: Path) -> None:
    """Undoes a replacement that was killed between its two renames. Any number of ranks may do it at once."""
    for old in run_folder.glob(f"checkpoint-*{OLD}"):
        final = old.with_name(old.name.removesuffix(OLD))
        if not final.exists() and is_complete(old):
            try:
                old.rename(final)
            except FileNotFoundError:
                continue  # another rank was faster


def leftovers(run_folder: Path) -> list[Path]:
    """What killed saves and deletions left."""
    return sorted(each for end in (PARTIAL, OLD) for each in run_folder.glob(f"checkpoint-*{end}"))


def sync(path: Path) -> None:
    """Waits until a file's bytes, or a folder's entries, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _old(final: Path) -> Path:
    return final.with_name(final.name + OLD)
