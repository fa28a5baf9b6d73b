"""What is in a tensor, from one look at its pieces: its norm, its largest value, values that are not finite."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class TensorStats:
    """One tensor. norm (Euclidean) and largest (absolute value) are of its finite elements."""

    name: str
    shape: tuple[int, ...]
    dtype: str
    norm: float
    largest: float
    not_finite: int


def stats_of(name: str, shape: Sequence[int], pieces: Iterable[torch.Tensor]) -> TensorStats:
    """Looks at the pieces of a flattened tensor, one after the other."""
    squares, largest, not_finite, dtype = 0.0, 0.0, 0, "none"
    for piece in pieces:
        dtype = str(piece.dtype).removeprefix("torch.")
        values = piece if piece.is_floating_point() else piece.double()
        norm = float(
            torch.linalg.vector_norm(values, dtype=torch.float64 if values.dtype == torch.float64 else torch.float32)
        )
        if not math.isfinite(norm):  # a value that is not finite, or finite ones too large for their squares in fp32
            finite = values[values.isfinite()].double()
            not_finite += values.numel() - finite.numel()
            values, norm = finite, float(torch.linalg.vector_norm(finite))
        squares += norm * norm
        if values.numel():
            largest = max(largest, float(values.abs().max()))
    return TensorStats(name, tuple(shape), dtype, math.sqrt(squares), largest, not_finite)


def table(stats: Sequence[TensorStats], *, shown: int | None) -> list[str]:
    """Lines of a table, the largest norm first; with `shown` only so many of the largest and of the smallest."""
    ordered = sorted(stats, key=lambda each: (-each.norm, each.name))
    lines = ["      norm   largest  not finite  type      name [shape]"]
    for place, each in enumerate(ordered):
        if shown is not None and shown <= place < len(ordered) - shown:
            if place == shown:
                lines.append(f"       ... {len(ordered) - 2 * shown} more (--all)")
            continue
        shape = ", ".join(map(str, each.shape))
        lines.append(
            f"{each.norm:10.4g}{each.largest:10.4g}{each.not_finite:12d}  {each.dtype:<9} {each.name} [{shape}]"
        )
    return lines
