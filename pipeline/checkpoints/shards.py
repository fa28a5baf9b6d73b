"""The shard files DeepSpeed writes: read as data, never as programs, and stitched back into whole tensors.

A .pt file is a pickle and a pickle can run code, so shards are opened with `weights_only=True` and an allow-list.
DeepSpeed itself opens them without, hence `refuse_unsafe_pickles` before it loads a checkpoint.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from enum import IntEnum
from pathlib import Path
from typing import Any

import torch


class _ZeroStage(IntEnum):
    """Stands in for DeepSpeed's enum, so that a checkpoint is read without importing deepspeed."""

    disabled = 0
    optimizer_states = 1
    gradients = 2
    weights = 3


class _LossScaler:
    """Stands in for DeepSpeed's loss scalers; nothing reads its fields."""


# All that an honest shard names beyond tensors and plain containers. The dynamic scaler appears under fp16.
_ALLOWED: list[Any] = [
    (_ZeroStage, "deepspeed.runtime.zero.config.ZeroStageEnum"),
    (_LossScaler, "deepspeed.runtime.fp16.loss_scaler.LossScaler"),
    (_LossScaler, "deepspeed.runtime.fp16.loss_scaler.DynamicLossScaler"),
]


def refuse_unsafe_pickles(folder: Path) -> None:
    """Scans every .pt and .pth file under `folder` without opening it as a pickle.

    Raises:
        ValueError: a file names a global beyond tensors, containers and DeepSpeed's stage enum and loss scalers, or is
            no file of torch.save; names the file and the global.
    """
    for path in sorted((*folder.rglob("*.pt"), *folder.rglob("*.pth"))):
        with torch.serialization.safe_globals(_ALLOWED):
            try:
                unsafe = torch.serialization.get_unsafe_globals_in_checkpoint(str(path))
            except Exception as error:  # a damaged zip or pickle fails in many ways, none of them is loadable
                raise ValueError(f"{path}: not a readable file of torch.save ({error}); do not load it") from error
        if unsafe:
            raise ValueError(
                f"{path}: would call {', '.join(sorted(unsafe))} when loaded, which no checkpoint of ours needs; "
                "do not load it, and find out who wrote it"
            )


def _load_shard(path: Path) -> dict[str, Any]:
    """One shard file with its tensors mapped, not read.

    Raises:
        ValueError: the file is damaged or names a global that is not allowed.
    """
    with torch.serialization.safe_globals(_ALLOWED):
        try:
            loaded = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        except Exception as error:  # as above; an OSError would otherwise reach the user as a traceback
            raise ValueError(f"{path}: cannot be read as a shard: {error}") from error
    if not isinstance(loaded, dict):
        raise ValueError(f"{path}: not a DeepSpeed shard (holds a {type(loaded).__name__})")
    return loaded


@dataclass(frozen=True)
class _Piece:
    """Where a trained parameter lies: elements [start, start + length) of each rank's flat groups, end to end."""

    shape: torch.Size
    start: int
    length: int


class Zero3Shards:
    """The parameters and buffers of one ZeRO-3 checkpoint, under the names they had in training.

    ZeRO-3 gives each of W ranks ceil(numel / W) elements of every parameter, in parameter order, zero-padded at the
    end (as deepspeed/utils/zero_to_fp32.py puts them together). Trained parameters come from the optimizer's fp32
    copies, frozen ones in the dtype they were trained with.

    Args:
        folder: the checkpoint folder, with its `latest` file.

    Raises:
        ValueError: the folder holds another ZeRO stage, or a shard is missing, damaged or of another run.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = _tag_folder(folder)
        optimizer_files = self._rank_files("optim_states")
        optimizers = [_fields(path, "optimizer_state_dict")[0] for path in optimizer_files]
        for path, optimizer in zip(optimizer_files, optimizers, strict=True):
            stage = optimizer.get("zero_stage")
            if stage != _ZeroStage.weights:
                raise ValueError(f"{path}: ZeRO stage {stage} shards; only stage 3 is converted")
            if optimizer.get("partition_count") != len(optimizer_files):
                raise ValueError(
                    f"{path}: written by {optimizer.get('partition_count')} ranks, but the folder has shards of "
                    f"{len(optimizer_files)}"
                )
        self.world_size = len(optimizer_files)
        self._flat_groups: list[list[torch.Tensor]] = [list(each["fp32_flat_groups"]) for each in optimizers]
        model_files = self._rank_files("model_states")
        if len(model_files) != self.world_size:
            raise ValueError(f"{self.folder}: {len(model_files)} model shards for {self.world_size} optimizer shards")
        names = ("module", "buffer_names", "shared_params", "param_shapes", "frozen_param_shapes")
        module, buffer_names, shared, groups, frozen_shapes = _fields(model_files[0], *names)
        self.aliases: dict[str, str] = dict(shared)
        self._buffers: dict[str, torch.Tensor] = {name: module[name] for name in buffer_names}
        # None when the run saved without its frozen parameters (LoRA).
        self._frozen_shapes: dict[str, torch.Size] = dict(frozen_shapes or {})
        self._frozen = [_fields(path, "frozen_param_fragments")[0] or {} for path in model_files]
        self._pieces = self._lay_out(groups)

    def __iter__(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Yields (name, tensor), one whole tensor at a time; `aliases` are left to the caller."""
        yield from self._buffers.items()
        for name, shape in self._frozen_shapes.items():
            fragments = [rank[name].flatten() for rank in self._frozen]
            yield name, _join(fragments, shape, name)
        for name, piece in self._pieces.items():
            fragments = [part for rank in self._flat_groups for part in _cut(rank, piece)]
            yield name, _join(fragments, piece.shape, name)

    def _rank_files(self, kind: str) -> list[Path]:
        """The files of all ranks in rank order (bf16 runs prefix some of them)."""
        ranks: dict[int, Path] = {}
        for path in self.folder.glob(f"*zero_pp_rank_*_mp_rank_00_{kind}.pt"):
            ranks[int(path.name.split("zero_pp_rank_")[1].split("_")[0])] = path
        if sorted(ranks) != list(range(len(ranks))) or not ranks:
            found = ", ".join(str(rank) for rank in sorted(ranks)) or "none"
            raise ValueError(
                f"{self.folder}: the {kind} files of some ranks are missing (ranks found: {found}); "
                "copy the shards of all ranks into one folder"
            )
        return [ranks[rank] for rank in range(len(ranks))]

    def _lay_out(self, groups: list[dict[str, torch.Size]]) -> dict[str, _Piece]:
        """Places the parameters of all optimizer groups; groups and flat buffers need not begin together."""
        pieces: dict[str, _Piece] = {}
        start = 0
        for name, shape in ((name, shape) for group in groups for name, shape in group.items()):
            length = math.ceil(shape.numel() / self.world_size)
            pieces[name] = _Piece(shape, start, length)
            start += length
        for rank, buffers in enumerate(self._flat_groups):
            held = sum(buffer.numel() for buffer in buffers)
            if held != start:
                raise ValueError(
                    f"{self.folder}: rank {rank} holds {held} elements where {start} are expected; "
                    "shards of another run are mixed in"
                )
        return pieces


def _fields(path: Path, *names: str) -> list[Any]:
    shard = _load_shard(path)
    for name in names:
        if name not in shard:
            raise ValueError(f"{path}: not a DeepSpeed shard ({name!r} is missing)")
    return [shard[name] for name in names]


def _tag_folder(folder: Path) -> Path:
    latest = folder / "latest"
    if not latest.is_file():
        raise ValueError(f"{folder}: no DeepSpeed checkpoint (no file `latest`)")
    tag = latest.read_text(encoding="utf-8").strip()
    if Path(tag).name != tag or not (folder / tag).is_dir():
        raise ValueError(f"{latest}: names {tag!r}, which is not a folder beside it")
    return folder / tag


def _cut(groups: list[torch.Tensor], piece: _Piece) -> Iterator[torch.Tensor]:
    """The parts of `piece` in one rank's flat groups: it may begin in one group and end in the next."""
    offset = 0
    for group in groups:
        first = max(piece.start - offset, 0)
        last = min(piece.start + piece.length - offset, group.numel())
        if first < last:
            yield group[first:last]
        offset += group.numel()


def _join(fragments: list[torch.Tensor], shape: torch.Size, name: str) -> torch.Tensor:
    whole = torch.cat(fragments)
    if whole.numel() < shape.numel():
        raise ValueError(f"{name}: its shards hold {whole.numel()} of {shape.numel()} elements")
    return whole[: shape.numel()].view(shape)
