"""Plausible mistakes, switched on for a case that must then fail its comparison."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch

from pipeline.methods.repnoise import KERNELS


def detached_lse_gradient(
    q: Any, k: Any, log_p: Any, grad_p: Any, segments: Any, position: int, scoring: Any, attend: Any
) -> Any:
    """The wrong gradient that a kernel's dropped LSE gradient leaves: only the numerator's."""
    c = (scoring.scale * grad_p * log_p.exp()).transpose(0, 1)
    grad_q, grad_k = torch.zeros_like(q), torch.zeros_like(k)
    group = q.shape[1] // k.shape[1]
    for first, end in segments.spans:
        sink = first + position
        k_s = k[sink].repeat_interleave(group, dim=0)
        grad_q[first:end] = c[first:end, :, None] * k_s
        grad_k[sink] = (c[first:end, :, None] * q[first:end]).sum(0).view(k.shape[1], group, -1).sum(1)
    return grad_q, grad_k


def local_norm(tensors: Any) -> torch.Tensor:
    """Each layer by itself, in place of one norm over all layers."""
    return torch.stack([each.float().square().sum() for each in tensors]).max()


def this_rank(_: Any, local: torch.Tensor) -> torch.Tensor:
    """A norm that was never summed over the ranks."""
    return local


def behind_copies(shards: Any, values: Any) -> None:
    """Write the shards and leave the gathered copies, which the next pass reads."""
    for parameter, value in zip(shards._parameters, values, strict=True):
        parameter.ds_tensor.data.copy_(value.view_as(parameter.ds_tensor))


def halved(shards: Any, values: Any) -> None:
    """The gradient of a penalty whose 1/2 was taken twice."""
    from deepspeed.utils import safe_get_local_grad, safe_set_local_grad

    for parameter, value in zip(shards._parameters, values, strict=True):
        safe_set_local_grad(parameter, safe_get_local_grad(parameter) + value / 2)


def hold_nothing(shards: Any, names: Any) -> Any:
    """Trust that no gradient means no movement."""
    return lambda: None


def slope_of_bandwidth(x: Any, y: Any) -> torch.Tensor:
    """The distance from noise, with a gradient through the kernels' bandwidth as well."""
    both = torch.cat([x, y])
    distance = torch.cdist(both, both).square()
    bandwidth = distance.sum() / (len(both) ** 2 - len(both)) / 4
    kernel = torch.stack([torch.exp(-distance / (bandwidth * 2**i)) for i in range(KERNELS)]).sum(0)
    n = len(x)
    return (kernel[:n, :n] + kernel[n:, n:] - kernel[:n, n:] - kernel[n:, :n]).mean()


def keep_gradients(_: Any) -> None:
    """Leave an auxiliary pass's gradient for the next one, and for the optimizer."""


MISTAKES = {
    "detached-lse": ("pipeline.sink.injection.sink_gradient", detached_lse_gradient),
    "norm-of-this-rank": ("pipeline.training.method.StepContext.total", this_rank),
    "behind-gathered-copies": ("pipeline.training.zero3.Shards._write", behind_copies),
    "pull-halved": ("pipeline.training.zero3.Shards.add_to_gradients", halved),
    "frozen-by-gradient-only": ("pipeline.training.zero3.Shards.hold", hold_nothing),
    "slope-of-bandwidth": ("pipeline.methods.repnoise.mmd", slope_of_bandwidth),
    "gradients-of-the-attack-kept": ("pipeline.training.zero3.Shards.forget_gradients", keep_gradients),
    "norm-of-one-layer": ("pipeline.training.passes.squared_sum", local_norm),
}


@contextmanager
def broken(name: str | None) -> Iterator[None]:
    """Make a mistake for as long as the block lasts; none without a name."""
    if name is None:
        yield
        return
    with mock.patch(*MISTAKES[name]):
        yield
