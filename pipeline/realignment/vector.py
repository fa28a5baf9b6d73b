"""The safety vector, theta_safe - theta_unsafe, tensor by tensor: from two checkpoints, or from an adapter.

The unsafe model and its adapter are hazardous. They are read here and nowhere else; no value of theirs is logged or
kept.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Protocol

import torch

from pipeline.checkpoints.lora import Adapter
from pipeline.checkpoints.model_folder import empty_model
from pipeline.checkpoints.weights_in import WeightsFolder
from pipeline.realignment.layers import finite

BLOCK = 2 * 2**20  # elements of a tensor that are worked on at once


class SafetyVector(Protocol):
    """delta = W_safe - W_unsafe of each tensor.

    Attributes:
        names: the tensors in which it may differ from zero.
    """

    names: set[str]

    def factors(self, name: str) -> tuple[torch.Tensor, torch.Tensor] | None:
        """fp32 left [rows, r] and right [r, columns] whose product is delta; None if it has no low-rank form."""
        ...

    def width(self, name: str) -> int | None:
        """That r."""
        ...

    def blocks(self, name: str, rows: int) -> Iterator[torch.Tensor]:
        """delta in fp32 [rows, columns], this many rows at a time; a tensor that is no matrix is one column."""
        ...


class DenseVector:
    """Of two checkpoints with the same names and shapes."""

    def __init__(self, safe: WeightsFolder, safe_folder: Path, unsafe: WeightsFolder, unsafe_folder: Path) -> None:
        self._safe, self._unsafe = safe, unsafe
        self._folders = safe_folder, unsafe_folder
        self.names = {name for name, spec in safe.specs.items() if spec.dtype.is_floating_point} & unsafe.specs.keys()

    def factors(self, name: str) -> None:
        return None

    def width(self, name: str) -> None:
        return None

    def blocks(self, name: str, rows: int) -> Iterator[torch.Tensor]:
        columns = columns_of(self._safe.specs[name].shape)
        read = [model.read(name, length=rows * columns) for model in (self._safe, self._unsafe)]
        for pieces in zip(*read, strict=True):
            safe, unsafe = (
                finite(piece.float(), name, folder) for piece, folder in zip(pieces, self._folders, strict=True)
            )
            yield (safe - unsafe).view(-1, columns)


class AdapterVector:
    """Of the safe model and a LoRA adapter on it: delta = - s B A.

    Raises:
        ValueError: the adapter does not fit the safe model, or holds more than low-rank updates.
    """

    def __init__(self, adapter_folder: Path, safe: WeightsFolder, safe_folder: Path) -> None:
        self._adapter = Adapter(adapter_folder)
        updates, replaced = self._adapter.plan(empty_model(safe_folder), safe.specs, safe_folder)
        self._updates = {update.name: update for update in updates}
        # Of an adapted head or embedding PEFT saves the frozen weight as well: that is the safe model's.
        if whole := sorted(replaced.keys() - self._updates.keys()):
            raise ValueError(
                f"--unsafe_adapter {adapter_folder}: holds whole tensors ({', '.join(whole[:3])}), as modules_to_save "
                "does; train it without them"
            )
        self.names = set(self._updates)

    def factors(self, name: str) -> tuple[torch.Tensor, torch.Tensor]:
        update = self._updates[name]
        first, second = (
            finite(self._adapter.file.load(each), each, self._adapter.folder) for each in (update.first, update.second)
        )
        left, right = (first.T, second.T) if update.transposed else (second, first)
        return left * -update.scaling, right

    def width(self, name: str) -> int:
        update = self._updates[name]
        return min(self._adapter.file.specs[update.second].shape)

    def blocks(self, name: str, rows: int) -> Iterator[torch.Tensor]:
        left, right = self.factors(name)
        return (part @ right for part in left.split(rows))


def columns_of(shape: tuple[int, ...]) -> int:
    """Of a tensor as a matrix."""
    return shape[-1] if len(shape) > 1 else 1


def rows_of(shape: tuple[int, ...]) -> int:
    """Rows of a matrix that are worked on at once: the same whatever file it lies in."""
    return max(BLOCK // columns_of(shape), 1)


def product_norm(left: torch.Tensor, right: torch.Tensor) -> float:
    """Frobenius norm of left @ right, without the product."""
    square = (left.T.double() @ left.double()) * (right.double() @ right.T.double())
    return float(square.sum().clamp(min=0).sqrt())
