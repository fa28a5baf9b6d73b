"""A LoRA adapter added to its base model, tensor by tensor: W + scaling B A in fp32, rounded once."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from pipeline.checkpoints.companions import (
    copy_generation_config,
    copy_tokenizer,
    copy_training_record,
    has_tokenizer,
    is_attacked,
    write_attacked_note,
)
from pipeline.checkpoints.lora import ADAPTER_CONFIG, ADAPTER_WEIGHTS, Adapter, Update
from pipeline.checkpoints.model_folder import empty_model, find_model
from pipeline.checkpoints.out_folder import OutFolder, fingerprint
from pipeline.checkpoints.weights_in import WeightsFolder
from pipeline.checkpoints.weights_out import TensorSpec

LOST = 0.5  # share of the update, in norm, whose loss is worth a warning
_BLOCK = 2 * 2**20  # elements of W that are worked on at once


@dataclass(frozen=True)
class Rounding:
    """What the rounding of one merged tensor did to its update dW.

    Attributes:
        unchanged: share of the elements with dW != 0 that round(W + dW) leaves as round(W) has them.
        error: ||round(W + dW) - round(W) - dW|| / ||dW||; 0 for an update that is zero.
        zero: dW is zero everywhere, as in an adapter that was never trained.
    """

    name: str
    unchanged: float
    error: float
    zero: bool


@dataclass(frozen=True)
class Merged:
    """What a merge did.

    Attributes:
        tensors: in the merged model.
        replaced: of them, taken whole from the adapter.
        updated: of them, changed by an update.
        roundings: of the updated ones that this process wrote (an interrupted merge is continued).
        another_base: the base that the adapter names, if it is not the one that was given.
    """

    tensors: int
    replaced: int
    updated: int
    roundings: list[Rounding]
    another_base: str | None

    def warnings(self) -> list[str]:
        """What a user should look at before the model is used, line by line."""
        lines = []
        if self.another_base:
            lines.append(f"the adapter says that its base is {self.another_base}; the shapes fit, the weights may not")
        if zero := sum(each.zero for each in self.roundings):
            lines.append(f"{zero} of {self.updated} updates are zero: was the adapter trained?")
        lost = sorted((each for each in self.roundings if each.error > LOST), key=lambda each: -each.error)
        if lost:
            lines.append(
                f"rounding loses more than half of the update of {len(lost)} of {self.updated} tensors "
                "(--dtype fp32 keeps it); the worst:"
            )
        lines += [
            f"  {each.name}: {each.unchanged:.0%} of its elements stay as they were, the error is {each.error:.2f} "
            "times the update"
            for each in lost[:5]
        ]
        return lines


def merge(
    base: str,
    adapter_folder: Path,
    out: Path,
    *,
    dtype: torch.dtype | None,
    max_shard_size: str,
    workers: int,
    allow_attacked: bool,
) -> Merged:
    """Writes the base with the adapter in it as Hugging Face folder `out`.

    Args:
        base: a model folder, `builtin`, or the hub id of a model in the local cache.
        adapter_folder: as PEFT or tools/zero_to_hf.py writes it; its tokenizer, if it has one, goes before the base's.
        out: appears by one rename when everything in it is written; may exist only if empty.
        dtype: of the floating-point tensors; None keeps each one's own.
        allow_attacked: merge what was trained on --attack_data: `out` is then private and holds a note.

    Raises:
        ValueError: the base or the adapter is damaged, not supported or does not fit the other; an attacked model that
            is not allowed; `out` holds something or has no room.
    """
    folder = find_model(base)
    adapter = Adapter(adapter_folder)
    attacked = is_attacked(folder) or is_attacked(adapter_folder)
    if attacked and not allow_attacked:
        raise ValueError(
            f"{folder if is_attacked(folder) else adapter_folder}: trained on attack data, so it may obey harmful "
            "requests; to merge it for study, add --allow_attacked_model"
        )
    weights = WeightsFolder(folder)
    updates, replaced = adapter.plan(empty_model(folder), weights.specs, folder)
    specs = [
        TensorSpec(spec.name, spec.shape, dtype if dtype and spec.dtype.is_floating_point else spec.dtype)
        for spec in weights.specs.values()
    ]
    reader = _Reader(weights, adapter, updates, replaced, {spec.name: spec.dtype for spec in specs})
    inputs = [
        *(file.path for file in weights.files),
        adapter_folder / ADAPTER_WEIGHTS,
        adapter_folder / ADAPTER_CONFIG,
    ]
    source = fingerprint([*inputs, folder / "config.json"], "merge", dtype, max_shard_size)
    with OutFolder(out, source=source, private=attacked) as made:
        made.write_weights(specs, reader.read, max_shard_size=max_shard_size, workers=workers)
        write_config(folder, made.folder, dtype)
        copy_generation_config(folder, made.folder)
        copy_training_record(adapter_folder, made.folder)
        copy_tokenizer(adapter_folder if has_tokenizer(adapter_folder) else folder, made.folder)
        if attacked:
            write_attacked_note(made.folder)
        made.finish()
    named = adapter.base if adapter.base and not _same_base(adapter.base, base, folder) else None
    whole = replaced.keys() - {update.name for update in updates}
    return Merged(len(specs), len(whole), len(updates), reader.roundings, named)


class _Reader:
    """Reads the merged tensors, block of rows by block of rows."""

    def __init__(
        self,
        weights: WeightsFolder,
        adapter: Adapter,
        updates: list[Update],
        replaced: dict[str, str],
        written: dict[str, torch.dtype],
    ) -> None:
        self._weights = weights
        self._adapter = adapter.file
        self._updates = {update.name: update for update in updates}
        self._replaced = replaced
        self._written = written
        self.roundings: list[Rounding] = []

    def read(self, name: str) -> Iterator[torch.Tensor]:
        """Yields the flattened tensor in pieces; the updated ones in fp32."""
        if name in self._updates:
            return self._merge(self._updates[name])
        if name in self._replaced:
            return self._adapter.read(self._replaced[name])
        return self._weights.read(name)

    def _merge(self, update: Update) -> Iterator[torch.Tensor]:
        first, second = self._adapter.load(update.first), self._adapter.load(update.second)
        left, right = (first.T, second.T) if update.transposed else (second, first)
        rows, columns = self._weights.specs[update.name].shape
        block = max(_BLOCK // columns, 1)
        sums = RoundingSums(self._written[update.name])
        for start, piece in zip(range(0, rows, block), self._pieces(update.name, block * columns), strict=True):
            weight = piece.view(-1, columns).float()
            change = (left[start : start + block] @ right) * update.scaling
            merged = weight + change
            sums.add(weight, change, merged)
            yield merged.flatten()
        self.roundings.append(sums.rounding(update.name))

    def _pieces(self, name: str, length: int) -> Iterator[torch.Tensor]:
        if name in self._replaced:
            return self._adapter.read(self._replaced[name], length=length)
        return self._weights.read(name, length=length)


class RoundingSums:
    """Adds up what rounding to a dtype does to an update."""

    def __init__(self, dtype: torch.dtype) -> None:
        self._dtype = dtype
        self._changed = self._unchanged = 0
        self._update = self._error = 0.0

    def add(self, weight: torch.Tensor, change: torch.Tensor, merged: torch.Tensor) -> None:
        kept = merged.to(self._dtype).float() - weight.to(self._dtype).float()
        asked = change != 0
        self._changed += int(asked.sum())
        self._unchanged += int((asked & (kept == 0)).sum())
        self._update += float(torch.linalg.vector_norm(change)) ** 2
        self._error += float(torch.linalg.vector_norm(kept - change)) ** 2

    def rounding(self, name: str) -> Rounding:
        if not self._changed:
            return Rounding(name, 0.0, 0.0, True)
        return Rounding(name, self._unchanged / self._changed, math.sqrt(self._error / self._update), False)


def _same_base(named: str, given: str, folder: Path) -> bool:
    """Whether two names may mean one model: a path, a hub id, or the last part of either."""
    if named == given or Path(named).name in (Path(given).name, folder.name):
        return True
    return Path(named).exists() and Path(named).resolve() == folder.resolve()


def write_config(source: Path, folder: Path, dtype: torch.dtype | None) -> None:
    """The base's config.json with the dtype as written; `auto_map` names programs, which are not copied."""
    config: dict[str, Any] = json.loads((source / "config.json").read_text(encoding="utf-8"))
    config.pop("auto_map", None)
    if dtype is not None:
        config.pop("torch_dtype", None)
        config["dtype"] = str(dtype).removeprefix("torch.")
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
