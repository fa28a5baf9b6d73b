"""Pack the rows of one forward pass into one row [1,T], the user's texts first and the reference texts after them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from pipeline.data.chat import Example


@dataclass(frozen=True)
class PackedBatch:
    """One packed row. `bounds` are the boundaries of all texts; the first `texts` of them are the user's.

    input_ids, position_ids [1,T] int64, positions restarting at each text; predict [N] int64, the positions whose next
    token is trained; targets [N] int64, those tokens. Reference texts have no targets.
    """

    input_ids: Tensor
    position_ids: Tensor
    bounds: tuple[int, ...]
    texts: int
    predict: Tensor
    targets: Tensor
    row_ids: tuple[str, ...]

    @property
    def reference_start(self) -> int:
        """The first reference token, or T."""
        return self.bounds[self.texts]

    @property
    def reference_bounds(self) -> tuple[int, ...]:
        """Boundaries of the reference texts, counted from `reference_start`."""
        return tuple(bound - self.reference_start for bound in self.bounds[self.texts :])

    def to(self, device: torch.device | str) -> PackedBatch:
        """The same batch with its tensors on `device`."""
        names = ("input_ids", "position_ids", "predict", "targets")
        return replace(self, **{name: getattr(self, name).to(device, non_blocking=True) for name in names})


def pack(examples: Sequence[Example], references: Sequence[Example] = ()) -> PackedBatch:
    """Concatenate the examples, then the references."""
    texts = [*examples, *references]
    bounds = [0]
    for text in texts:
        bounds.append(bounds[-1] + len(text.input_ids))
    positions = torch.cat([torch.arange(len(text.input_ids)) for text in texts])
    predict, targets = [], []
    for start, example in zip(bounds, examples, strict=False):
        for i, label in enumerate(example.labels[1:]):
            if label != -100:
                predict.append(start + i)
                targets.append(label)
    return PackedBatch(
        input_ids=torch.tensor([token for text in texts for token in text.input_ids])[None],
        position_ids=positions[None],
        bounds=tuple(bounds),
        texts=len(examples),
        predict=torch.tensor(predict, dtype=torch.int64),
        targets=torch.tensor(targets, dtype=torch.int64),
        row_ids=tuple(example.row_id for example in texts),
    )
