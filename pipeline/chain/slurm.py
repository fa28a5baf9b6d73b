"""A chain as Slurm jobs: one a stage, each starting when those it waits for have ended well.

A job (slurm/stage.sh) asks for its stage's words with `begin`, runs them, and says with `end` that it has finished.
The records are those of the runner that does all stages itself, so either goes on where the other stopped.
"""

from __future__ import annotations

import os
import shlex
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path

from pipeline.chain.attacked import delete_unneeded
from pipeline.chain.doors import ROOT
from pipeline.chain.process import PRIVATE_UMASK
from pipeline.chain.runner import begun
from pipeline.chain.stages import Stage
from pipeline.chain.state import Action, ChainFolder, plan

JOB = "slurm/stage.sh"


def submit(stages: Sequence[Stage], recipe: Path, resources: str, *, keep_models: bool) -> list[str]:
    """Submit a job for each stage that has not finished; returns a line about each stage.

    resources: words for sbatch, such as `-N2 --gpus-per-node=8`; stages other than training get them with one node.
    Errors: ValueError if sbatch refuses a job, with those submitted before cancelled, or away from the repository.
    """
    if not (Path.cwd() / JOB).is_file():
        raise ValueError(f"--slurm: {Path.cwd()} has no {JOB}: start it at the root of the repository")
    folder = ChainFolder(stages[0].output_dir)
    (stages[0].output_dir / "logs").mkdir(parents=True, exist_ok=True)
    jobs: dict[str, str] = {}
    lines = []
    with folder.locked():
        actions = plan(stages, folder.read())
        for stage in stages:
            if actions[stage.name] is Action.SKIP:
                lines.append(f"{stage.name}: finished before")
                continue
            waits = [jobs[each] for each in stage.waits if each in jobs]
            try:
                jobs[stage.name] = _sbatch(stage, recipe, resources, waits, keep_models)
            except ValueError:
                if jobs:
                    subprocess.run(["scancel", *jobs.values()], check=False)
                raise
            after = f" after {', '.join(waits)}" if waits else ""
            lines.append(f"{stage.name}: job {jobs[stage.name]}{after}, log in {stage.log}")
    return lines


def _sbatch(stage: Stage, recipe: Path, resources: str, waits: Sequence[str], keep_models: bool) -> str:
    """Submit one job and return its id."""
    words = ["sbatch", "--parsable", *shlex.split(resources)]
    if stage.run != "train":
        words.append("--nodes=1")
    if waits:
        words += [f"--dependency=afterok:{':'.join(waits)}", "--kill-on-invalid-dep=yes"]
    words += [f"--job-name={stage.output_dir.name}-{stage.name}", f"--output={stage.log}", JOB]
    words += [str(recipe), str(stage.output_dir), stage.name, *(["--keep_models"] if keep_models else [])]
    try:
        # The job has the umask of this call.
        done = subprocess.run(
            words, text=True, capture_output=True, check=False,
            umask=PRIVATE_UMASK if stage.attacked or stage.reads_attacked else -1,
        )  # fmt: skip
    except OSError as error:
        raise ValueError(f"--slurm: sbatch cannot be started ({error.strerror}): is this a login node?") from error
    if done.returncode != 0:
        raise ValueError(f"--slurm {resources}: stage {stage.name} was not accepted: {done.stderr.strip()}")
    return done.stdout.strip().partition(";")[0]


def begin(stages: Sequence[Stage], name: str) -> list[str]:
    """Record that a stage starts; returns its door's file and words, nothing if it has finished before.

    Errors: ValueError if there is no such stage, or one it waits for has not finished.
    """
    stage = _named(stages, name)
    folder = ChainFolder(stage.output_dir)
    with folder.locked(short=True):
        records = folder.read()
        actions = plan(stages, records)
        if actions[name] is Action.SKIP:
            return []
        if unfinished := [each for each in stage.waits if actions[each] is not Action.SKIP]:
            raise ValueError(f"stage {name} waits for {', '.join(unfinished)}")
        resume = begun(stage, actions[name], records, folder)
    words = [str((ROOT / stage.door.file).relative_to(ROOT)), *stage.arguments()]
    # slurm/launch.sh lets every training resume.
    return words if stage.run == "train" or not resume else [*words, *stage.door.resume_flags]


def end(stages: Sequence[Stage], name: str, *, keep_models: bool) -> list[str]:
    """Record that a stage has finished; returns the stages whose attacked weights are deleted now."""
    stage = _named(stages, name)
    folder = ChainFolder(stage.output_dir)
    with folder.locked(short=True):
        records = folder.read()
        record = records[name]
        record.finished, record.seconds = True, time.time() - os.stat(folder.path(name)).st_mtime
        folder.write(record)
        done = [each.name for each in stages if each.name in records and records[each.name].finished]
        return [] if keep_models else delete_unneeded(stages, done, records, folder)


def _named(stages: Sequence[Stage], name: str) -> Stage:
    for stage in stages:
        if stage.name == name:
            return stage
    raise ValueError(f"the recipe has no stage {name}")
