"""Which doors a recipe may run, and what the runner has to know about each of them."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

ROOT = Path(__file__).resolve().parents[2]


@dataclass(frozen=True, kw_only=True)
class Door:
    """One entry point of the project.

    file: path below the repository root.
    positional: the `with` keys that are given by position, in this order; all of them are required.
    output_by_position: the stage's folder follows the positional keys, instead of being --output_dir.
    reads_weights: needs the weights of the stages it refers to, not only their logs and results.
    weights: where the weights it makes lie in its folder: `checkpoint-*` folders, the whole folder, or a symbolic link
        `checkpoint` to the weights of another stage.
    guarded: refuses an attacked model unless --allow_attacked_model is given.
    continues: when it was killed and is started again it goes on in its folder, given resume_flags; other doors start
        from an empty one.
    """

    file: str
    positional: tuple[str, ...] = ()
    output_by_position: bool = False
    reads_weights: bool = True
    weights: Literal["checkpoints", "folder", "link"] | None = None
    guarded: bool = False
    continues: bool = False
    resume_flags: tuple[str, ...] = ()


DOORS = {
    "curate": Door(file="pipeline/curate.py", continues=True),
    "train": Door(
        file="pipeline/train.py",
        weights="checkpoints",
        guarded=True,
        continues=True,
        resume_flags=("--resume_from_checkpoint", "auto"),
    ),
    "convert": Door(
        file="tools/zero_to_hf.py", positional=("checkpoint",), output_by_position=True, weights="folder", guarded=True
    ),
    "match": Door(file="tools/match_checkpoint.py", positional=("run",), weights="link"),
    "measure": Door(file="pipeline/measure.py"),
    "assess": Door(file="pipeline/assess.py", continues=True),
    "compare": Door(file="tools/compare.py", reads_weights=False),
}
