"""The shards of a ZeRO-3 checkpoint, cut anew for another number of ranks: each rank reads its own ranges.

ZeRO-3 flattens every parameter, pads it to a multiple of the ranks and gives each rank one piece; a rank's pieces of
the parameters of one group lie end to end in one flat tensor, and so does each optimizer state. A piece of the new
layout is therefore a few ranges of the old files, copied without any arithmetic: weights and moments keep every bit.

DeepSpeed's own way (`ds_to_universal`, then `load_universal`) is not taken: it writes the checkpoint once more, reads
every tensor whole on every rank, and gives all parameter groups the settings of the first, so that norms and biases
would begin to decay.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pipeline.checkpoints.tensor_file import Region, RegionReader, TensorFile

Shapes = Mapping[str, torch.Size]


@dataclass(frozen=True)
class _Place:
    """A parameter in the old files: its group, where its piece begins in the group's flat tensor, and the piece's
    length."""

    group: int
    start: int
    length: int


class Resharded:
    """A checkpoint of `written_by` ranks as any number of other ranks would have written it.

    Args:
        folder: the folder of the shards, `checkpoint-N/global_stepN`.

    Raises:
        ValueError: a shard is missing, damaged, or of another run.
    """

    def __init__(self, folder: Path, written_by: int) -> None:
        self._files = [
            TensorFile(_only(folder, f"*zero_pp_rank_{rank}_*optim_states.pt")) for rank in range(written_by)
        ]
        self._model = TensorFile(_only(folder, "zero_pp_rank_0_*model_states.pt"))
        self._reader = RegionReader()
        self._regions: dict[tuple[str, int, int], Region] = {}
        self._states = [each.contents["optimizer_state_dict"] for each in self._files]
        self._places: dict[str, _Place] = {}
        for group, shapes in enumerate(self._model.contents["param_shapes"]):
            place = 0
            for name, shape in shapes.items():
                length = math.ceil(shape.numel() / written_by)
                self._places[name] = _Place(group, place, length)
                place += length
            for rank, state in enumerate(self._states):
                held = state["fp32_flat_groups"][group].numel()
                if held != place:
                    raise ValueError(
                        f"{folder}: rank {rank} holds {held} elements of group {group} where {place} are expected: "
                        "shards of another run are mixed in; use another checkpoint-N folder"
                    )

    def model_states(self) -> dict[str, Any]:
        """What a rank's model file holds beside sharded weights: buffers, schedule and counters."""
        contents = dict(self._model.contents)
        contents["module"] = {name: self._read(self._model, each) for name, each in contents["module"].items()}
        return contents

    def optimizer_states(
        self, groups: Sequence[Shapes], group_of: Sequence[int], rank: int, ranks: int
    ) -> dict[str, Any]:
        """What the optimizer file of `rank` of `ranks` would hold: fp32 weights, optimizer states, settings.

        Args:
            groups: names and shapes of the parameters of each flat tensor of the new layout, in its order.
            group_of: for each of them, its group of the optimizer's settings.

        Raises:
            ValueError: the parameters are not those of the checkpoint, or the optimizer keeps a state that is neither
                one value an element nor the same everywhere.
        """
        missing = {name for shapes in groups for name in shapes} ^ self._places.keys()
        if missing:
            raise ValueError(
                f"the checkpoint and the model differ in {len(missing)} trained parameters ({min(missing)} ...): "
                "they belong to different runs"
            )
        optimizer = self._states[0]["optimizer_state_dict"]
        if len(optimizer["param_groups"]) <= max(group_of):
            raise ValueError("the checkpoint has fewer optimizer groups than this run")
        settings = [
            {**old, "params": [flat for flat, group in enumerate(group_of) if group == number]}
            for number, old in enumerate(optimizer["param_groups"])
        ]
        states = {flat: self._group_states(shapes, rank, ranks) for flat, shapes in enumerate(groups)}
        return {
            "optimizer_state_dict": {**optimizer, "state": states, "param_groups": settings},
            "fp32_flat_groups": [self._cut("fp32_flat_groups", shapes, rank, ranks) for shapes in groups],
            "dynamic_loss_scale": self._states[0]["dynamic_loss_scale"],
            "overflow": self._states[0]["overflow"],
            "partition_count": ranks,
        }

    def _group_states(self, shapes: Shapes, rank: int, ranks: int) -> dict[str, Any]:
        """The optimizer's states of one flat tensor."""
        states: dict[str, Any] = {}
        old = [state["optimizer_state_dict"]["state"] for state in self._states]
        used = {self._places[name].group for name in shapes}
        for name, example in old[0][min(used)].items():
            if isinstance(example, Tensor) and example.dim() == 1:
                states[name] = self._cut(name, shapes, rank, ranks)
                continue
            values = [
                self._read(file, state[group][name])
                for file, state in zip(self._files, old, strict=True)
                for group in used
            ]
            if any(not _same(value, values[0]) for value in values):
                raise ValueError(
                    f"the optimizer's state {name} differs between the ranks or groups that wrote the checkpoint and "
                    "cannot be cut anew: start as many ranks as wrote it"
                )
            states[name] = values[0]
        return states

    def _cut(self, kind: str, shapes: Shapes, rank: int, ranks: int) -> Tensor:
        """This rank's flat tensor of "fp32_flat_groups" or of an optimizer state; the padding is zero."""
        lengths = {name: math.ceil(shape.numel() / ranks) for name, shape in shapes.items()}
        dtype = self._old(kind, 0, self._places[next(iter(shapes))].group).dtype
        flat = torch.zeros(sum(lengths.values()), dtype=dtype)
        begin = 0
        for name, shape in shapes.items():
            start, length = rank * lengths[name], lengths[name]
            place = begin
            for piece in self._pieces(kind, name, start, min(start + length, shape.numel())):
                flat[place : place + piece.numel()] = piece
                place += piece.numel()
            begin += length
        return flat

    def _pieces(self, kind: str, name: str, start: int, end: int) -> Iterator[Tensor]:
        """Elements [start, end) of a whole flattened parameter, or of its state, from the ranks that hold them."""
        old = self._places[name]
        for rank in range(start // old.length, math.ceil(end / old.length)) if start < end else ():
            first, last = max(start - rank * old.length, 0), min(end - rank * old.length, old.length)
            held = self._old(kind, rank, old.group)
            yield from self._reader.read([held.cut(old.start + first, old.start + last)])

    def _old(self, kind: str, rank: int, group: int) -> Region:
        """Where a flat tensor of the checkpoint lies."""
        if (kind, rank, group) not in self._regions:
            state = self._states[rank]
            weights = kind == "fp32_flat_groups"
            flat = state[kind][group] if weights else state["optimizer_state_dict"]["state"][group][kind]
            self._regions[kind, rank, group] = self._files[rank].locate(flat)
        return self._regions[kind, rank, group]

    def _read(self, file: TensorFile, value: Any) -> Any:
        """A value of a file's contents with its data."""
        if not isinstance(value, Tensor):
            return value
        if value.numel() == 0:
            return torch.empty(value.shape, dtype=value.dtype)
        pieces = [piece.clone() for piece in self._reader.read([file.locate(value)])]
        return torch.cat(pieces).view(value.shape)


def _only(folder: Path, pattern: str) -> Path:
    found = sorted(folder.glob(pattern))
    if len(found) != 1:
        raise ValueError(
            f"{folder}: {len(found)} files {pattern}, and there should be 1; use another checkpoint-N folder"
        )
    return found[0]


def _same(one: Any, other: Any) -> bool:
    if isinstance(one, Tensor) and isinstance(other, Tensor):
        return torch.equal(one, other)
    return type(one) is type(other) and bool(one == other)
