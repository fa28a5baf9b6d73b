"""Saving a run so that it continues bit for bit, whatever dies while it is saved.

Each rank writes its own shards; nothing is gathered. They go into `checkpoint-N.partial`, each file is on the disk
before the marker of `checkpoints/markers.py` is written, and one rename makes it `checkpoint-N`. The data order and
the reference draws are functions of the seed and the step, so the step is all there is to store of them.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from pipeline.checkpoints import folders
from pipeline.checkpoints.markers import newest_complete, write_complete_marker
from pipeline.checkpoints.space import require_space, shown
from pipeline.training.distributed import together
from pipeline.training.engine import Engine
from pipeline.training.generators import rng_state
from pipeline.training.manifest import write_json
from pipeline.training.prepared import Prepared
from pipeline.training.zero3 import Shards

TRAINER_STATE = "trainer_state.json"


class SaveFailed(RuntimeError):
    """A checkpoint could not be written; raised on all ranks together."""


def save(run: Prepared, engine: Engine, step: int) -> Path:
    """Write `checkpoint-<step>` of the run folder; collective. Older ones beyond --save_total_limit go after the new
    one is complete.

    Errors: SaveFailed on every rank that still lives; what was complete before stays as it was.
    """
    final = run.output_dir / f"checkpoint-{step}"
    partial = folders.partial(final)

    def make_room() -> None:
        remove_leftovers(run)
        require_space(run.output_dir, run.checkpoint_bytes, flag="--output_dir", what="a checkpoint")
        (partial / _tag(step)).mkdir(parents=True)

    def write() -> None:
        _write_shards(run, engine, partial, step)
        rng = partial / f"rng_state_{run.world.rank}.pth"
        torch.save(rng_state(), rng)
        folders.sync(rng)
        if run.world.main:
            _write_companions(run, engine, partial, step)

    def publish() -> None:
        for folder in (partial / _tag(step), partial):
            folders.sync(folder)
        write_complete_marker(partial, step=step, world_size=run.world.size, attacked=run.attacked)
        folders.publish(final)
        if run.train.save_total_limit:
            folders.prune(run.output_dir, keep=run.train.save_total_limit, newest=final)

    for action, main_only in ((make_room, True), (write, False), (publish, True)):
        try:
            problems = together(run.world, action, main_only=main_only)
        except RuntimeError as error:
            reason = str(error).splitlines()[0]
            raise SaveFailed(_message(run, final, [f"another rank ended while it was saved ({reason})"])) from error
        if problems:
            if run.world.main:
                shutil.rmtree(partial, ignore_errors=True)
            raise SaveFailed(_message(run, final, problems))
    return final


def remove_leftovers(run: Prepared) -> None:
    """Delete what killed saves left in the run folder. Rank 0 calls it, while no rank saves."""
    for folder in folders.leftovers(run.output_dir):
        shutil.rmtree(folder)


def uses_adapter(run: Prepared) -> bool:
    """Only an adapter is trained; checkpoints leave the frozen weights out."""
    return bool(run.lora.lora_r or run.model.adapter_name_or_path)


def _tag(step: int) -> str:
    return f"global_step{step}"


def _message(run: Prepared, final: Path, problems: list[str]) -> str:
    left = newest_complete(run.output_dir)
    remedy = f"{left.name} is complete: --resume_from_checkpoint auto goes on from it" if left else "none is complete"
    return f"{final} was not saved: {'; '.join(problems)}. {remedy}"


class _Writes:
    """DeepSpeed's writes of one save. A rank whose write fails goes on through DeepSpeed's collectives without writing
    any more: the other ranks would wait for it there."""

    def __init__(self) -> None:
        self.failed: Exception | None = None

    def guarded(self, write: Callable[..., None]) -> Callable[..., None]:
        def call(*args: Any, **kwargs: Any) -> None:
            if self.failed is None:
                try:
                    write(*args, **kwargs)
                except (OSError, RuntimeError) as error:
                    self.failed = error

        return call


def _write_shards(run: Prepared, engine: Engine, folder: Path, step: int) -> None:
    """DeepSpeed's shards of this rank, each on the disk when this returns."""
    deepspeed = engine.deepspeed
    files, scripts = deepspeed.checkpoint_engine, deepspeed._copy_recovery_script
    writes = _Writes()

    def save_file(state_dict: Any, path: str) -> None:
        try:
            type(files).save(files, state_dict, path)
            folders.sync(Path(path))
        except (OSError, RuntimeError) as error:  # torch's words name neither the file nor the reason
            free, reason = shown(shutil.disk_usage(folder).free), str(error).splitlines()[0]
            raise OSError(f"{path} cannot be written, and {free} are free there ({reason})") from error

    shards = Shards(deepspeed)
    shards.attach(run.method.kept_shards())
    files.save = writes.guarded(save_file)
    deepspeed._copy_recovery_script = writes.guarded(scripts)
    try:
        # Without `latest`, which rank 0 alone would write inside it.
        deepspeed.save_checkpoint(
            str(folder), tag=_tag(step), client_state={"step": step}, save_latest=False,
            exclude_frozen_parameters=uses_adapter(run),
        )  # fmt: skip
    finally:
        del files.save, deepspeed._copy_recovery_script
        shards.detach(run.method.shard_states)
    if writes.failed is not None:
        raise writes.failed


def _write_companions(run: Prepared, engine: Engine, folder: Path, step: int) -> None:
    """What makes the folder loadable and convertible without the run: the name of DeepSpeed's folder, configuration,
    tokenizer, adapter configuration, trainer state."""
    (folder / "latest").write_text(_tag(step), encoding="utf-8")
    module: Any = engine.deepspeed.module
    if uses_adapter(run):
        for adapter in module.peft_config.values():
            adapter.save_pretrained(folder)
        module = module.get_base_model()
    module.config.save_pretrained(folder)
    if module.generation_config is not None:
        module.generation_config.save_pretrained(folder)
    run.tokenizer.save_pretrained(folder)
    write_json(
        folder / TRAINER_STATE,
        {"global_step": step, "max_steps": run.steps, "seed": run.train.seed, "method": run.method.state()},
    )
    for path in folder.rglob("*"):
        if path.is_file() and path.suffix not in (".pt", ".pth"):
            folders.sync(path)
