"""Stage B: the tuned model with its updates, as a whole model or as a low-rank adapter; one tensor at a time."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig

from pipeline.checkpoints.companions import copy_generation_config, copy_tokenizer, write_attacked_note
from pipeline.checkpoints.merge import RoundingSums, write_config
from pipeline.checkpoints.out_folder import OutFolder
from pipeline.checkpoints.weights_in import WeightsFolder
from pipeline.checkpoints.weights_out import TensorSpec
from pipeline.evaluation.jsonl import append_lines, resume_lines
from pipeline.realignment.models import Models
from pipeline.realignment.update import Lssf, Updates
from pipeline.realignment.vector import columns_of, product_norm, rows_of

_ADAPTER = "adapter_model"


class Changes:
    """What was done to each tensor, kept until the folder is whole, so that the report of a continued run is complete.

    path: of the lines; those of another source are thrown away.
    """

    def __init__(self, path: Path, source: str) -> None:
        self._path, self._adding = path, threading.Lock()
        lines = resume_lines(path)
        if not lines or lines[0] != {"source": source}:
            path.unlink(missing_ok=True)
            path.parent.mkdir(parents=True, exist_ok=True)
            append_lines(path, [{"source": source}])

    def add(self, name: str, numbers: Mapping[str, Any]) -> None:
        """One tensor is done."""
        with self._adding:
            append_lines(self._path, [{"name": name, **numbers}])

    def by_name(self) -> dict[str, dict[str, Any]]:
        """The numbers of each tensor."""
        return {line["name"]: line for line in resume_lines(self._path)[1:]}

    def remove(self) -> None:
        """The report holds them."""
        self._path.unlink()


def write_model(
    models: Models,
    updates: Updates,
    made: OutFolder,
    changes: Changes,
    *,
    alpha: float,
    dtype: torch.dtype | None,
    max_shard_size: str,
    workers: int,
) -> int:
    """Writes weights, configuration and tokenizer; tensors without an update are copied. Returns how many there are.

    dtype: of the floating-point tensors; None keeps each one's own.
    """
    specs = [
        TensorSpec(spec.name, spec.shape, dtype if dtype and spec.dtype.is_floating_point else spec.dtype)
        for spec in models.tuned.specs.values()
    ]
    reader = _Reader(models.tuned, updates, changes, alpha, {spec.name: spec.dtype for spec in specs})
    made.write_weights(specs, reader.read, max_shard_size=max_shard_size, workers=workers)
    write_config(models.tuned_folder, made.folder, dtype)
    copy_generation_config(models.tuned_folder, made.folder)
    copy_tokenizer(models.tuned_folder, made.folder)
    if models.attacked:
        write_attacked_note(made.folder)
    return len(specs)


def write_adapter(
    models: Models, updates: Lssf, made: OutFolder, changes: Changes, *, base: str, dtype: torch.dtype, workers: int
) -> int:
    """Writes the updates as a PEFT LoRA adapter of the tuned model, scaled by 1. Returns how many tensors it changes.

    base: the tuned model as the user named it.

    Raises:
        ValueError: an update's rank is so high that the adapter would be larger than the map.
    """
    ranks = {name: updates.width(name) for name in sorted(updates.names)}
    specs: list[TensorSpec] = []
    reads: dict[str, tuple[str, int]] = {}
    for name, rank in ranks.items():
        rows, columns = models.tuned.specs[name].shape
        if rank * (rows + columns) > rows * columns:
            raise ValueError(
                f"--output_form adapter: the update of {name} has rank {rank}, so the adapter would be larger than "
                "the map itself; lower --eta, or use --output_form model"
            )
        module = f"base_model.model.{name.removesuffix('.weight')}"
        for side, (key, shape) in enumerate((("lora_A", (rank, columns)), ("lora_B", (rows, rank)))):
            specs.append(TensorSpec(f"{module}.{key}.weight", shape, dtype))
            reads[specs[-1].name] = (name, side)
    read = _adapter_reader(models, updates, changes, reads)
    made.write_weights(specs, read, max_shard_size=None, workers=workers, stem=_ADAPTER)
    modules = {name.removesuffix(".weight"): rank for name, rank in ranks.items()}
    config = LoraConfig(
        task_type="CAUSAL_LM",
        base_model_name_or_path=base,
        inference_mode=True,
        target_modules=sorted(modules),
        rank_pattern=modules,
        alpha_pattern=dict(modules),
    )
    config.save_pretrained(str(made.folder))
    return len(ranks)


def _adapter_reader(
    models: Models, updates: Lssf, changes: Changes, reads: Mapping[str, tuple[str, int]]
) -> Callable[[str], Iterator[torch.Tensor]]:
    """Both factors of an update are read one after the other: the pair is computed once and kept for the second."""
    kept: dict[str, torch.Tensor] = {}

    def read(tensor: str) -> Iterator[torch.Tensor]:
        name, side = reads[tensor]
        if side == 0:
            left, right, delta_norm = updates.factors(name, models.tuned.specs[name].shape)
            changes.add(name, {"delta_norm": delta_norm, "update_norm": product_norm(left, right)})
            kept[name] = left
            yield right
        else:
            yield kept.pop(name)

    return read


class _Reader:
    """Reads the realigned tensors, block of rows by block of rows."""

    def __init__(
        self,
        weights: WeightsFolder,
        updates: Updates,
        changes: Changes,
        alpha: float,
        written: Mapping[str, torch.dtype],
    ) -> None:
        self._weights, self._updates, self._changes = weights, updates, changes
        self._alpha, self._written = alpha, written

    def read(self, name: str) -> Iterator[torch.Tensor]:
        """Yields the flattened tensor in pieces; a changed one in fp32."""
        return self._changed(name) if name in self._updates.names else self._weights.read(name)

    def _changed(self, name: str) -> Iterator[torch.Tensor]:
        shape = self._weights.specs[name].shape
        columns = columns_of(shape)
        change = self._updates.change(name, shape)
        sums = RoundingSums(self._written[name])
        weights = updates = 0.0
        pieces = self._weights.read(name, length=rows_of(shape) * columns)
        for piece, update in zip(pieces, change.blocks, strict=True):
            weight = piece.view(-1, columns).float()
            merged = weight + update
            sums.add(weight, update, merged)
            weights += float(torch.linalg.vector_norm(weight, dtype=torch.float64)) ** 2
            updates += float(torch.linalg.vector_norm(update, dtype=torch.float64)) ** 2
            yield merged.flatten()
        rounding = sums.rounding(name)
        delta_norm = updates**0.5 / self._alpha if change.delta_norm is None else change.delta_norm
        self._changes.add(
            name,
            {
                "delta_norm": delta_norm,
                "update_norm": updates**0.5,
                "weight_norm": weights**0.5,
                "unchanged": rounding.unchanged,
                "rounding_error": rounding.error,
            },
        )
