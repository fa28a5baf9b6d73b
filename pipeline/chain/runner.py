"""Runs a chain: one stage after the other, each once, however often and wherever the runner is killed in between."""

from __future__ import annotations

import shlex
import shutil
import time
from collections.abc import Sequence
from pathlib import Path

from pipeline.chain.attacked import attacked_weights, delete, delete_unneeded
from pipeline.chain.process import Stopped, minutes, run_logged, stopping
from pipeline.chain.stages import Stage
from pipeline.chain.state import Action, ChainFolder, Record, plan

LOG_TAIL = 20  # lines shown of the log of a stage that failed
NAMED_STAGES = 6  # up to so many stages are named in one line


class StageFailed(Exception):
    """A stage's door ended with an exit code other than 0."""


def show_plan(stages: Sequence[Stage]) -> str:
    """What a run would do: for each stage its state, and the command if it has to run. Errors: those of the run."""
    output_dir = stages[0].output_dir
    actions = plan(stages, ChainFolder(output_dir).read())
    lines = []
    for number, stage in enumerate(stages, 1):
        action = actions[stage.name]
        lines.append(f"{_label(number, stages)}: {action.value}")
        if action is not Action.SKIP:
            lines.append(f"    {shlex.join(stage.command())}")
    return "\n".join(lines)


def run_chain(stages: Sequence[Stage], *, keep_models: bool) -> None:
    """Run the stages that have not finished yet.

    Unless keep_models, the weights of attacked models are deleted as soon as no stage left to run reads them.
    Errors: ValueError before any stage runs if the folder holds something else or another runner is at work;
    StageFailed; Stopped on a signal, with the running stage ended.
    """
    output_dir = stages[0].output_dir
    folder = ChainFolder(output_dir)
    with folder.locked() as lock, stopping():
        records = folder.read()
        actions = plan(stages, records)
        for name in set(records) - {stage.name for stage in stages}:
            folder.forget(name)
        start = time.monotonic()
        done: list[str] = []
        try:
            for number, stage in enumerate(stages, 1):
                label = _label(number, stages)
                action = actions[stage.name]
                if action is Action.SKIP:
                    print(f"{label}: finished before", flush=True)
                else:
                    _run(stage, action, records, folder, label, lock)
                done.append(stage.name)
                if not keep_models and (deleted := delete_unneeded(stages, done, records, folder)):
                    names = ", ".join(deleted)
                    print(f"{label}: deleted the attacked weights of {names}: no stage left reads them", flush=True)
        except (StageFailed, Stopped):
            _report_attacked(stages, "they are needed to go on; --clean removes them")
            raise
        all_stages = sum(records[stage.name].seconds for stage in stages)
        print(f"chain finished in {minutes(time.monotonic() - start)}; its stages took {minutes(all_stages)} in all")
        if keep_models:
            _report_attacked(stages, "kept as --keep_models asks; --clean removes them")
        for stage in stages:
            if stage.run == "compare":
                print(f"\n{(stage.folder / 'table.md').read_text(encoding='utf-8')}", end="")


def clean(stages: Sequence[Stage]) -> None:
    """Remove the weights of all attacked models of the chain.

    An attacked stage that has not finished loses its whole folder: it starts from the beginning next time.
    Errors: ValueError while a runner is at work.
    """
    folder = ChainFolder(stages[0].output_dir)
    with folder.locked():
        records = folder.read()
        for stage in stages:
            left = attacked_weights(stage) if stage.name in records else []  # else it is not this chain's
            for path in left:
                print(f"removing {path}", flush=True)
            if left:
                record = records[stage.name]
                delete(stage, record, folder)
                if not record.finished:
                    _remove(stage.folder)
                    folder.forget(stage.name)


def _label(number: int, stages: Sequence[Stage]) -> str:
    return f"[{number}/{len(stages)}] {stages[number - 1].name}"


def begun(stage: Stage, action: Action, records: dict[str, Record], folder: ChainFolder) -> bool:
    """Record that a stage starts, in an empty folder unless its door goes on, which is what is returned."""
    resume = action is Action.CONTINUE and stage.door.continues
    if not resume:
        _remove(stage.folder)
        inputs = {name: records[name].id for name in stage.waits}
        records[stage.name] = Record(stage.name, stage.definition, inputs, stage.command())
    folder.write(records[stage.name])
    if (stage.attacked or stage.reads_attacked) and stage.folder.is_dir():
        stage.folder.chmod(0o700)
    return resume


def _run(stage: Stage, action: Action, records: dict[str, Record], folder: ChainFolder, label: str, lock: int) -> None:
    resume = begun(stage, action, records, folder)
    record = records[stage.name]
    private = stage.attacked or stage.reads_attacked
    print(f"{label}: {'resumed' if resume else 'started'}, log in {stage.log}", flush=True)
    start = time.monotonic()
    code = run_logged(stage.command(resume=resume), stage.log, label=label, lock=lock, private=private)
    if code != 0:
        lines = stage.log.read_text(encoding="utf-8", errors="replace").splitlines()
        tail = "\n".join(f"    {line}" for line in lines[-LOG_TAIL:])
        raise StageFailed(f"stage {stage.name} failed with exit code {code}; the end of {stage.log}:\n{tail}")
    record.seconds = time.monotonic() - start
    record.finished = True
    folder.write(record)
    print(f"{label}: finished in {minutes(record.seconds)}", flush=True)


def _remove(folder: Path) -> None:
    if folder.exists():
        shutil.rmtree(folder)


def _report_attacked(stages: Sequence[Stage], why: str) -> None:
    left = [stage.name for stage in stages if attacked_weights(stage)]
    if left:
        whose = ", ".join(left) if len(left) <= NAMED_STAGES else f"{len(left)} stages"
        print(f"the attacked weights of {whose} are in {stages[0].output_dir} ({why})", flush=True)
