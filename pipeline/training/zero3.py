"""The only file that touches partitioned parameters: under ZeRO-3 a rank holds a shard of each weight and of each
gradient.

Outside a gather a parameter has no elements and no `.grad`; its gradient shard is fp32 inside the optimizer, averaged
over ranks.
"""

from __future__ import annotations

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
