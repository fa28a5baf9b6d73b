"""What a chain's folder remembers between two starts of the runner, and what is left to do.

`OUTPUT_DIR/.chain/STAGE.json` is written when a stage starts and again when it has finished, each time under a
temporary name and renamed, so that a runner killed at any point leaves a folder the next one understands.
"""

from __future__ import annotations

import fcntl
import json
import os
import socket
import time
import uuid
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from enum import Enum
from pathlib import Path

from pipeline.chain.guard import GRACE_SECONDS
from pipeline.chain.stages import Stage
from pipeline.config import Problems


@dataclass
class Record:
    """One stage's state.

    inputs: the `id` that each stage it waited for had; one made anew gets another id, and this stage is out of date.
    seconds: how long the start took that finished.
    """

    stage: str
    definition: str
    inputs: dict[str, str]
    command: list[str]
    id: str = field(default_factory=lambda: uuid.uuid4().hex)
    finished: bool = False
    seconds: float = 0.0
    weights_deleted: bool = False


class Action(Enum):
    """What the runner does with a stage."""

    SKIP = "finished"
    RUN = "to run"
    CONTINUE = "to continue"
    ANEW = "to run anew: a stage it depends on was run again"


class ChainFolder:
    """The runner's own records below a chain's output folder."""

    def __init__(self, output_dir: Path) -> None:
        self.output_dir = output_dir
        self._folder = output_dir / ".chain"

    def read(self) -> dict[str, Record]:
        """All records by stage name. Errors: ValueError for a record that is not one of ours."""
        records = {}
        for path in sorted(self._folder.glob("*.json")):
            try:
                record = Record(**json.loads(path.read_text(encoding="utf-8")))
            except (TypeError, ValueError) as error:
                raise ValueError(
                    f"{path}: not a record of the chain runner ({error}); use another --output_dir"
                ) from error
            records[record.stage] = record
        return records

    def path(self, stage: str) -> Path:
        """The file of a stage's record."""
        return self._folder / f"{stage}.json"

    def write(self, record: Record) -> None:
        temporary = self._folder / f"{record.stage}.json.tmp"
        temporary.write_text(json.dumps(asdict(record), indent=1) + "\n", encoding="utf-8")
        temporary.replace(self.path(record.stage))

    def forget(self, stage: str) -> None:
        self.path(stage).unlink(missing_ok=True)

    @contextmanager
    def locked(self, *, short: bool = False) -> Iterator[int]:
        """Hold the folder for one runner; yields the lock's file descriptor. `short` waits for a holder that lives:
        jobs of a chain hold it for moments.

        A stage's guard inherits it, so the lock of a killed runner is free only when its last stage has ended.
        Errors: ValueError while another runner is at work.
        """
        self._folder.mkdir(parents=True, exist_ok=True)
        with (self._folder / "lock").open("a+", encoding="utf-8") as lock:
            deadline = time.monotonic() + 2 * GRACE_SECONDS
            while not _try_lock(lock.fileno()):
                lock.seek(0)
                holder = lock.read().strip()
                if (not short and _is_alive(holder)) or time.monotonic() > deadline:
                    raise ValueError(f"--output_dir {self.output_dir}: another runner ({holder}) is at work there")
                time.sleep(0.2)
            lock.truncate(0)
            lock.write(f"host {socket.gethostname()} process {os.getpid()}")
            lock.flush()
            yield lock.fileno()


def _try_lock(descriptor: int) -> bool:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _is_alive(holder: str) -> bool:
    """Whether the runner that wrote `host H process P` lives; one on another host is taken to."""
    words = holder.split()
    if len(words) != 4 or words[1] != socket.gethostname():
        return bool(words)
    return Path(f"/proc/{words[3]}").exists()


def plan(stages: Sequence[Stage], records: Mapping[str, Record]) -> dict[str, Action]:
    """What to do with each stage. Errors: Problems when the folder holds something else than this recipe makes."""
    known = {stage.name for stage in stages}
    gone = [stages[0].output_dir / name for name in records if name not in known]
    problems = [f"{path} was made by a stage that the recipe does not have" for path in gone if _holds_something(path)]
    actions: dict[str, Action] = {}
    for stage in stages:
        record = records.get(stage.name)
        if _holds_something(stage.folder) and record is None:
            problems.append(f"{stage.folder} holds something, and no stage of a chain made it")
        elif _holds_something(stage.folder) and record is not None and record.definition != stage.definition:
            problems.append(f"{stage.folder} was made by a stage {stage.name} with another definition")
        inputs = {each: records[each].id for each in stage.waits if actions[each] is Action.SKIP}
        actions[stage.name] = _action(stage, record, inputs)
    if problems:
        raise Problems([*problems, "use another --output_dir, or remove these folders to have them made anew"])
    _check_weights(stages, records, actions)
    return actions


def _action(stage: Stage, record: Record | None, inputs: Mapping[str, str]) -> Action:
    """`inputs`: the ids of those of the stages it waits for that stay as they are."""
    if record is None or record.definition != stage.definition:
        return Action.RUN
    exists = _holds_something(stage.folder)
    # Of a finished stage records stay when its weights are deleted, unless its folder is nothing but the weights.
    emptied = record.weights_deleted and stage.door.weights == "folder"
    if record.finished and not exists and not emptied:
        return Action.RUN  # the user removed the folder to have it made anew
    if inputs != record.inputs:
        return Action.ANEW
    if record.finished:
        return Action.SKIP
    return Action.CONTINUE if exists else Action.RUN


def _holds_something(folder: Path) -> bool:
    return folder.is_dir() and any(folder.iterdir())


def _check_weights(stages: Sequence[Stage], records: Mapping[str, Record], actions: Mapping[str, Action]) -> None:
    """Errors: Problems naming what to remove when a stage has to run that needs weights the runner has deleted."""
    by_name = {stage.name: stage for stage in stages}
    problems = []
    for stage in stages:
        if actions[stage.name] is Action.SKIP or not stage.door.reads_weights:
            continue
        gone = [each for each in stage.reads if actions[each] is Action.SKIP and records[each].weights_deleted]
        if gone:
            sources = [by_name[each] for each in _ancestors(gone, by_name)]
            folders = " ".join(
                str(each.folder) for each in sources if each.attacked and each.door.weights == "checkpoints"
            )
            problems.append(
                f"stage {stage.name} has to run, but the attacked weights of {', '.join(gone)} were deleted: "
                "use another --output_dir with --keep_models"
                + (f", or remove {folders} to train again" if folders else "")
            )
    if problems:
        raise Problems(problems)


def _ancestors(names: Sequence[str], by_name: Mapping[str, Stage]) -> list[str]:
    """These stages and all that they refer to, directly or not, in the chain's order."""
    found = set(names)
    for stage in reversed(list(by_name.values())):
        if stage.name in found:
            found.update(stage.reads)
    return [name for name in by_name if name in found]
