"""Continuing a run from a checkpoint: bit for bit on as many ranks as wrote it, on others with the shards cut anew."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from pipeline.checkpoints.contents import content_problems
from pipeline.checkpoints.markers import Marker, read_marker
from pipeline.checkpoints.pickles import refuse_unsafe_pickle
from pipeline.checkpoints.reshard import Resharded
from pipeline.config import Problems
from pipeline.training import zero3
from pipeline.training.distributed import World, together
from pipeline.training.engine import Engine
from pipeline.training.generators import seed_everything, set_rng_state
from pipeline.training.prepared import Prepared
from pipeline.training.saving import TRAINER_STATE, uses_adapter
from pipeline.training.zero3 import Shards


def open_checkpoint(here: World, folder: Path | None) -> Marker | None:
    """Check the checkpoint to continue from before anything of it is loaded: no file may run code (DeepSpeed unpickles
    without restriction), and every byte is as it was written. The ranks share the reading. Collective.

    Errors: Problems with what any rank found, on all ranks.
    """
    chosen: list[Path | None] = [None] * here.size
    dist.all_gather_object(chosen, folder)
    if others := sorted({str(each) for each in chosen} - {str(chosen[0])}):
        raise ValueError(
            f"--resume_from_checkpoint: rank 0 finds {chosen[0]}, and another rank {others[0]}: the run folder must "
            "be on a disk that all nodes share"
        )
    if folder is None:
        return None
    marker = read_marker(folder)
    pickles = sorted((*folder.rglob("*.pt"), *folder.rglob("*.pth")))

    def scan() -> None:
        for path in pickles[here.rank :: here.size]:
            refuse_unsafe_pickle(path)
        if problems := content_problems(folder, marker.sums, sorted(marker.files)[here.rank :: here.size]):
            raise Problems(problems)
        shards = {path.relative_to(folder).as_posix() for path in pickles if path.parent.name == _tag(marker)}
        if here.main and (unlisted := sorted(shards - marker.files.keys())):
            raise ValueError(f"{folder}: {unlisted[0]} was not there when the checkpoint was written: remove it")

    if problems := together(here, scan):
        raise Problems([f"--resume_from_checkpoint {each}" for problem in problems for each in problem.splitlines()])
    return marker


def load(run: Prepared, engine: Engine, marker: Marker) -> None:
    """Restore weights, optimizer, schedule and random generators from `run.resume`, whose marker `open_checkpoint`
    returned. Collective."""
    assert run.resume is not None
    folder = run.resume
    strict, tag = not uses_adapter(run), _tag(marker)
    if marker.world_size == run.world.size:
        engine.deepspeed.load_checkpoint(str(folder), tag=tag, load_module_strict=strict)
        set_rng_state(torch.load(folder / f"rng_state_{run.world.rank}.pth", weights_only=True))
        _resume_method(run, engine, folder)
        return
    own: list[dict[str, Any]] = []

    def cut() -> None:
        old = Resharded(folder / tag, marker.world_size)
        groups, group_of = zero3.flat_groups(engine.deepspeed)
        own.extend((old.model_states(), old.optimizer_states(groups, group_of, run.world.rank, run.world.size)))

    if problems := together(run.world, cut):
        raise Problems([f"--resume_from_checkpoint {each}" for each in problems])
    zero3.load_states(engine.deepspeed, *own, strict=strict)
    seed_everything(run.train.seed, run.world.rank, marker.step)
    _resume_method(run, engine, folder)


def _resume_method(run: Prepared, engine: Engine, folder: Path) -> None:
    """Give the method what it keeps from step to step."""
    state = json.loads((folder / TRAINER_STATE).read_text(encoding="utf-8")).get("method", {})
    try:
        run.method.resume(state, Shards(engine.deepspeed).detach(run.method.shard_states))
    except (ValueError, KeyError, TypeError) as error:
        raise Problems([f"--resume_from_checkpoint {folder}: {error}"]) from error


def _tag(marker: Marker) -> str:
    """DeepSpeed's folder of the shards. Its file `latest` names it as well; what is not needed is not trusted."""
    return f"global_step{marker.step}"
