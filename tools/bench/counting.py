"""Counts the collectives that DeepSpeed makes, where it hands them to the communication library."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from tools.bench.product_step import ProductStep

# The backend's method: which argument holds the whole tensor (gathered, or yet to be scattered), and the kind.
METHODS = {
    "all_gather_into_tensor": ("output_tensor", "all_gather"),
    "all_gather": ("tensor_list", "all_gather"),
    "all_gather_coalesced": ("output_tensors", "all_gather"),
    "reduce_scatter_tensor": ("input_tensor", "reduce_scatter"),
    "reduce_scatter": ("input_list", "reduce_scatter"),
}

Counts = dict[str, dict[str, int]]


class Counter:
    """Counts from its creation on, in this process. The process group must exist."""

    def __init__(self) -> None:
        import deepspeed

        self._counts = _zero()
        backend = deepspeed.comm.comm.cdb
        for name, (whole, kind) in METHODS.items():
            setattr(backend, name, self._counted(getattr(backend, name), whole, kind))

    def take(self) -> Counts:
        """Calls and elements by kind since the last time."""
        taken, self._counts = self._counts, _zero()
        return taken

    def _counted(self, method: Callable[..., Any], whole: str, kind: str) -> Callable[..., Any]:
        position = 1 if whole.startswith("input") else 0

        def counted(*args: Any, **kwargs: Any) -> Any:
            tensors = kwargs[whole] if whole in kwargs else args[position]
            self._counts[kind]["calls"] += 1
            self._counts[kind]["elements"] += _elements(tensors)
            return method(*args, **kwargs)

        return counted


def _zero() -> Counts:
    return {kind: {"calls": 0, "elements": 0} for kind in ("all_gather", "reduce_scatter")}


def _elements(tensors: Tensor | list[Tensor]) -> int:
    return tensors.numel() if isinstance(tensors, Tensor) else sum(each.numel() for each in tensors)


def count_steps(step: ProductStep, counter: Counter, steps: int) -> list[Counts]:
    """The collectives of each of some steps, after two in which ZeRO-3 traces the order of its parameters."""
    for _ in range(2):
        step()
    found = []
    for _ in range(steps):
        counter.take()
        step()
        found.append(counter.take())
    return found
