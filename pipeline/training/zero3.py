"""The only file that touches partitioned parameters: under ZeRO-3 a rank holds a shard of each weight and of each
gradient.

Outside a gather a parameter has no elements and no `.grad`; its gradient shard is fp32 inside the optimizer, averaged
over ranks.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor


def squared_gradient_norm(engine: Any) -> Tensor:
    """This rank's part of the squared gradient norm (scalar, fp64 on the device) after the step's last backward; the
    sum over ranks is the whole, because shards are disjoint and padded with zeros."""
    from deepspeed.utils import safe_get_local_grad

    trained = [each for each in engine.module.parameters() if each.requires_grad]
    return torch.stack([safe_get_local_grad(each).double().square().sum() for each in trained]).sum()


def release_gathered(engine: Any) -> None:
    """Drop gathered copies of weights: a lone forward (evaluation) leaves some behind."""
    engine.optimizer.empty_partition_cache()


def size(parameter: Tensor) -> int:
    """Elements of the whole parameter, sharded or not."""
    return int(getattr(parameter, "ds_numel", parameter.numel()))


def flat_groups(engine: Any) -> tuple[list[Mapping[str, torch.Size]], list[int]]:
    """How the optimizer holds its parameters: names and whole shapes in each flat tensor, and each flat tensor's group
    of settings."""
    shapes: list[Mapping[str, torch.Size]] = engine._get_zero_param_shapes()
    return shapes, [engine.optimizer.sub_group_to_group_id[flat] for flat in range(len(shapes))]


def load_states(
    engine: Any, model_states: Mapping[str, Any], optimizer_states: dict[str, Any], *, strict: bool
) -> None:
    """What `engine.load_checkpoint` does with this rank's two files, from their contents. Collective."""
    import torch.distributed as dist

    optimizer = engine.optimizer
    optimizer.checkpoint_event_prologue()
    engine.load_module_state_dict(model_states, strict=strict)
    if engine.lr_scheduler is not None:
        engine.lr_scheduler.load_state_dict(model_states["lr_scheduler"])
    for counter in ("global_steps", "global_samples", "skipped_steps"):
        setattr(engine, counter, model_states[counter])
    of_ranks = [
        optimizer_states | {"loss_scaler": optimizer.loss_scaler}
    ] * dist.get_world_size()  # each reads its own
    optimizer.load_state_dict(of_ranks)
    optimizer.checkpoint_event_epilogue()
