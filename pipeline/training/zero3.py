"""The only file that touches partitioned parameters: under ZeRO-3 a rank holds a shard of each weight and of each
gradient.

Outside a gather a parameter has no elements and no `.grad`; its gradient shard is fp32 inside the optimizer, averaged
over ranks.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor


def local_gradients(engine: Any) -> Iterator[tuple[str, Tensor]]:
    """This rank's gradient shard (flat, fp32, zero-padded) of each trainable parameter, after the step's last
    backward."""
    from deepspeed.utils import safe_get_local_grad

    for name, parameter in engine.module.named_parameters():
        if parameter.requires_grad:
            yield name, safe_get_local_grad(parameter)


def squared_gradient_norm(engine: Any) -> Tensor:
    """This rank's part of the squared gradient norm (scalar, fp32 on the device); the sum over ranks is the whole."""
    squares = [gradient.double().square().sum() for _, gradient in local_gradients(engine)]
    return torch.stack(squares).sum()


def release_gathered(engine: Any) -> None:
    """Drop gathered copies of weights: a lone forward (evaluation) leaves some behind."""
    engine.optimizer.empty_partition_cache()


def size(parameter: Tensor) -> int:
    """Elements of the whole parameter, sharded or not."""
    return int(getattr(parameter, "ds_numel", parameter.numel()))
