"""Saving a run so that it continues bit for bit, and continuing it.

Each rank writes its own shards; nothing is gathered. The marker of `checkpoints/markers.py` comes last, after a
barrier: a checkpoint without it is half-written and never resumed. The data order and the reference draws are
functions of the seed and the step, so the step is all there is to store of them.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from pipeline.checkpoints.markers import complete_checkpoints, read_marker, write_complete_marker
from pipeline.checkpoints.shards import refuse_unsafe_pickles
from pipeline.training.engine import Engine
from pipeline.training.manifest import write_json
from pipeline.training.prepared import Prepared


def save(run: Prepared, engine: Engine, step: int) -> Path:
    """Write `checkpoint-<step>` of the run folder; collective. Older ones beyond --save_total_limit go after the new
    one is complete."""
    folder = run.output_dir / f"checkpoint-{step}"
    if run.world.main and folder.exists():
        shutil.rmtree(folder)  # half-written, or a complete one of the same step that a resumed run makes again
    dist.barrier()
    folder.mkdir(parents=True, exist_ok=True)
    engine.deepspeed.save_checkpoint(
        str(folder), tag=f"global_step{step}", client_state={"step": step}, exclude_frozen_parameters=uses_adapter(run)
    )
    torch.save(_rng_state(), folder / f"rng_state_{run.world.rank}.pth")
    if run.world.main:
        _save_companions(run, engine, folder, step)
    dist.barrier()
    if run.world.main:
        write_complete_marker(folder, step=step, world_size=run.world.size, attacked=run.attacked)
        if run.train.save_total_limit:
            for old in complete_checkpoints(run.output_dir)[: -run.train.save_total_limit]:
                shutil.rmtree(old)
    dist.barrier()
    return folder


def load(run: Prepared, engine: Engine, folder: Path) -> int:
    """Restore weights, optimizer, schedule and random generators from a complete checkpoint; returns its step."""
    marker = read_marker(folder)
    refuse_unsafe_pickles(folder)  # DeepSpeed unpickles without restriction
    engine.deepspeed.load_checkpoint(str(folder), load_module_strict=not uses_adapter(run))
    rng = torch.load(folder / f"rng_state_{run.world.rank}.pth", weights_only=True)
    torch.set_rng_state(rng["cpu"])
    if "cuda" in rng:
        torch.cuda.set_rng_state(rng["cuda"])
    return marker.step


def uses_adapter(run: Prepared) -> bool:
    """Only an adapter is trained; checkpoints leave the frozen weights out."""
    return bool(run.lora.lora_r or run.model.adapter_name_or_path)


def _rng_state() -> dict[str, torch.Tensor]:
    state = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state()
    return state


def seed_everything(seed: int, rank: int) -> None:
    """Dropout differs between ranks; everything drawn by numpy elsewhere has generators of its own."""
    torch.manual_seed(seed + rank)
    np.random.seed(seed % 2**32)


def _save_companions(run: Prepared, engine: Engine, folder: Path, step: int) -> None:
    """What makes the folder convertible without the run: configuration, tokenizer, adapter configuration, trainer
    state."""
    module: Any = engine.deepspeed.module
    if uses_adapter(run):
        for adapter in module.peft_config.values():
            adapter.save_pretrained(folder)
        module = module.get_base_model()
    module.config.save_pretrained(folder)
    if module.generation_config is not None:
        module.generation_config.save_pretrained(folder)
    run.tokenizer.save_pretrained(folder)
    write_json(folder / "trainer_state.json", {"global_step": step, "max_steps": run.steps, "seed": run.train.seed})
