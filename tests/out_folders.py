"""A folder of weights, written through OutFolder."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import torch

from pipeline.checkpoints.out_folder import OutFolder
from pipeline.checkpoints.weights_out import TensorSpec


def specs_of(tensors: dict[str, torch.Tensor], dtype: torch.dtype | None = None) -> list[TensorSpec]:
    return [TensorSpec(name, tuple(each.shape), dtype or each.dtype) for name, each in tensors.items()]


def write(
    out: Path,
    tensors: dict[str, torch.Tensor],
    dtype: torch.dtype | None = None,
    *,
    size: int | str | None = "5GB",
    workers: int = 1,
    piece: int = 300,
    private: bool = False,
) -> Path:
    def read(name: str) -> Iterator[torch.Tensor]:
        buffer = torch.empty(piece, dtype=tensors[name].dtype)  # used for every piece, as the contract allows
        for part in tensors[name].flatten().split(piece):
            yield buffer[: len(part)].copy_(part)

    with OutFolder(out, source="test", private=private) as made:
        made.write_weights(specs_of(tensors, dtype), read, max_shard_size=size, workers=workers)
        made.finish()
    return out
