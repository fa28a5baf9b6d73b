"""The shard files that DeepSpeed writes under ZeRO-1, 2 and 3, as whole tensors that lie in pieces.

How the pieces fit together was learned from deepspeed/utils/zero_to_fp32.py, to which the tests hold it.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from pipeline.checkpoints.tensor_file import Region, RegionReader, TensorFile

# The fp32 copies of the trained parameters: under ZeRO-3, and under ZeRO-1 and 2.
_FLAT_GROUPS = "fp32_flat_groups"
_FLAT_PARTITIONS = "single_partition_of_fp32_groups"
_ALIKE = ("ds_version", "global_steps", "global_samples", "skipped_steps", "dp_world_size")


@dataclass(frozen=True)
class Stored:
    """One tensor of a checkpoint. trained: from the optimizer's copies, else a buffer or a frozen parameter."""

    shape: torch.Size
    dtype: torch.dtype
    trained: bool = False


class Shards:
    """The parameters and buffers of one checkpoint, under the names they had in training.

    Trained parameters come from the optimizer's fp32 copies, frozen ones and buffers in the dtype they were trained
    with. A parameter with several names is stored under one of them.

    Attributes:
        folder: the folder of the shards, which `latest` names.
        files: the shards.
        world_size: ranks that wrote them.
        tensors: shape and dtype by name.
        aliases: the other names of shared parameters, by which of them the parameter is stored.

    Args:
        folder: the checkpoint folder, with its `latest` file.

    Raises:
        ValueError: a shard is missing, damaged or of another run; or of what DeepSpeed shards in another way.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = _tag_folder(folder)
        optimizer_files, model_files = _find_files(self.folder)
        self.files = [*optimizer_files, *model_files]
        self.world_size = len(optimizer_files)
        self.tensors: dict[str, Stored] = {}
        self._places: dict[str, _Place] = {}
        optimizers = [_Optimizer(path, self.world_size) for path in optimizer_files]
        _compare_ranks(self.folder, [each.progress for each in optimizers])
        self._groups = [each.groups for each in optimizers]
        sharded = optimizers[0].sharded
        models = [_Model(path) for path in model_files]
        _compare_ranks(self.folder, [each.progress for each in models])
        if len(models) != (self.world_size if sharded else 1):
            raise ValueError(f"{self.folder}: {len(models)} model shards for {self.world_size} optimizer shards")
        self._whole = {name: [region] for name, region in models[0].buffers.items()}
        for name in models[0].frozen_shapes:
            self._whole[name] = [each.frozen[name] for each in models if name in each.frozen]
        for name, shape in (models[0].buffer_shapes | models[0].frozen_shapes).items():
            if not self._whole[name]:
                raise ValueError(
                    f"{model_files[0]}: not a model shard of DeepSpeed ({name} has a shape and no values)"
                )
            self.tensors[name] = Stored(shape, self._whole[name][0].dtype)
        if sharded:
            self._lay_out_parameters(models[0].trained_shapes)
        else:
            self._lay_out_partitions(models[0].trained_shapes, optimizers[0].paddings)
        self.aliases = {name: stored for name, stored in models[0].aliases.items() if stored in self.tensors}

    def regions(self, name: str) -> list[Region]:
        """Where the elements of a tensor lie, in order.

        Raises:
            ValueError: the shards do not hold all of them.
        """
        pieces = self._whole[name] if name in self._whole else list(self._places[name].regions())
        wanted = self.tensors[name].shape.numel()
        held = sum(piece.numel for piece in pieces)
        if held < wanted:
            raise ValueError(f"{self.folder}: {name}: its shards hold {held} of {wanted} elements")
        return list(cut(pieces, 0, wanted))  # without the padding of the last rank

    def _lay_out_parameters(self, groups: Sequence[Mapping[str, torch.Size]]) -> None:
        """ZeRO-3: each of W ranks has ceil(numel / W) elements of every parameter, in the order of the parameters,
        padded at the end. Optimizer groups and flat buffers need not begin together."""
        start = 0
        for name, shape in ((name, shape) for group in groups for name, shape in group.items()):
            length = math.ceil(shape.numel() / self.world_size)
            self._place(name, shape, _Place(self._groups, start, length))
            start += length
        for rank, buffers in enumerate(self._groups):
            held = sum(buffer.numel for buffer in buffers)
            if held != start:
                raise ValueError(
                    f"{self.folder}: rank {rank} holds {held} elements where {start} are expected; "
                    "shards of another run are mixed in"
                )

    def _lay_out_partitions(
        self, groups: Sequence[Mapping[str, torch.Size]], paddings: Sequence[Sequence[int]] | None
    ) -> None:
        """ZeRO-1 and 2: the parameters of each optimizer group lie end to end in one vector, which the ranks share
        equally; the vector is padded to a multiple of 2 W, a parameter by what `paddings` says."""
        for index, group in enumerate(groups):
            vector = [rank[index] for rank in self._groups if index < len(rank)]
            gaps = paddings[index] if paddings is not None else [0] * len(group)
            start = 0
            for (name, shape), gap in zip(group.items(), gaps, strict=True):
                self._place(name, shape, _Place([vector], start, shape.numel()))
                start += shape.numel() + gap
            held, unit = sum(piece.numel for piece in vector), 2 * self.world_size
            if math.ceil(start / unit) != math.ceil(held / unit):
                raise ValueError(
                    f"{self.folder}: optimizer group {index} holds {held} elements where {start} are expected; "
                    "shards of another run are mixed in"
                )

    def _place(self, name: str, shape: torch.Size, place: _Place) -> None:
        self.tensors[name] = Stored(shape, torch.float32, trained=True)
        self._places[name] = place


def cut(regions: Sequence[Region], first: int, last: int) -> Iterator[Region]:
    """Elements [first, last) of regions that are taken end to end."""
    offset = 0
    for region in regions:
        begin, end = max(first - offset, 0), min(last - offset, region.numel)
        if begin < end:
            yield region.cut(begin, end)
        offset += region.numel


@dataclass(frozen=True)
class _Place:
    """Elements [start, start + length) of each of the vectors, whose regions are taken end to end."""

    vectors: Sequence[Sequence[Region]]
    start: int
    length: int

    def regions(self) -> Iterator[Region]:
        for vector in self.vectors:
            yield from cut(vector, self.start, self.start + self.length)


class _Optimizer:
    """What is needed of one rank's optimizer shard. sharded: the parameters are, as under ZeRO-3."""

    def __init__(self, path: Path, world_size: int) -> None:
        file = TensorFile(path)
        state = _field(path, file.contents, "optimizer_state_dict")
        try:
            count = state["partition_count"]
            counts = set(count) if isinstance(count, list | tuple) else {count}
            self.sharded = _FLAT_GROUPS in state
            self.groups = [file.locate(each) for each in state[_FLAT_GROUPS if self.sharded else _FLAT_PARTITIONS]]
            self.paddings: list[list[int]] | None = state.get("param_alignment_paddings")
            self.progress = {"optimizer steps": _optimizer_step(file, state)}
            self.progress |= {"ZeRO stage": int(state["zero_stage"])} if "zero_stage" in state else {}
        except (KeyError, TypeError, AttributeError, IndexError) as error:
            raise ValueError(f"{path}: not a ZeRO shard of DeepSpeed ({error!r})") from error
        if counts != {world_size}:
            written = " and ".join(str(each) for each in sorted(counts))
            raise ValueError(f"{path}: written by {written} ranks, but the folder has shards of {world_size}")


class _Model:
    """What is needed of a model shard. frozen: empty when the run saved without its frozen parameters (LoRA)."""

    def __init__(self, path: Path) -> None:
        file = TensorFile(path)
        contents = file.contents
        module, buffers = _field(path, contents, "module"), _field(path, contents, "buffer_names")
        try:
            self.progress = {name: contents[name] for name in _ALIKE if name in contents}
            self.aliases: dict[str, str] = dict(contents["shared_params"])
            self.trained_shapes: list[dict[str, torch.Size]] = list(contents["param_shapes"])
            self.frozen_shapes: dict[str, torch.Size] = dict(contents.get("frozen_param_shapes") or {})
            self.buffer_shapes: dict[str, torch.Size] = {name: module[name].shape for name in buffers}
            self.buffers = {name: file.locate(module[name]) for name in buffers}
            fragments = contents.get("frozen_param_fragments") or {}
            self.frozen = {name: file.locate(fragment) for name, fragment in fragments.items()}
        except (KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"{path}: not a model shard of DeepSpeed ({error!r})") from error


def _field(path: Path, contents: Mapping[str, Any], name: str) -> Any:
    if name not in contents:
        raise ValueError(f"{path}: not a DeepSpeed shard ({name!r} is missing)")
    return contents[name]


def _optimizer_step(file: TensorFile, state: Mapping[str, Any]) -> int | None:
    """Steps the torch optimizer has done; None if it does not count them by parameter."""
    base = state.get("base_optimizer_state", state.get("optimizer_state_dict"))
    parameters = base.get("state", {}) if isinstance(base, dict) else {}
    for parameter in parameters.values():
        if isinstance(step := parameter.get("step"), torch.Tensor):
            return int(next(RegionReader().read([file.locate(step)])).item())
        return None if step is None else int(step)
    return None


def _compare_ranks(folder: Path, progress: Sequence[Mapping[str, object]]) -> None:
    for rank, found in enumerate(progress):
        for name, value in progress[0].items():
            if found.get(name) != value:
                raise ValueError(
                    f"{folder}: rank {rank} has {name} {found.get(name)} and rank 0 has {value}; shards of another "
                    "run or step are mixed in"
                )


def _find_files(folder: Path) -> tuple[list[Path], list[Path]]:
    """Optimizer shards and model shards, each in the order of the ranks (some names begin with the dtype)."""
    for path in folder.glob("*.pt"):
        if not path.resolve().is_relative_to(folder.parent.resolve()):
            raise ValueError(f"{path}: is a link out of the checkpoint; copy the file to its place")
        if re.search(r"mp_rank_(?!00_)\d+_|layer_\d+_expert_", path.name):
            raise ValueError(f"{path}: written under model or expert parallelism, which is not converted")
    optimizer = _rank_files(folder, "optim_states")
    whole = folder / "mp_rank_00_model_states.pt"
    return optimizer, [whole] if whole.is_file() else _rank_files(folder, "model_states")


def _rank_files(folder: Path, kind: str) -> list[Path]:
    ranks: dict[int, Path] = {}
    for path in folder.glob(f"*zero_pp_rank_*_mp_rank_00_{kind}.pt"):
        ranks[int(path.name.split("zero_pp_rank_")[1].split("_")[0])] = path
    if sorted(ranks) != list(range(len(ranks))) or not ranks:
        found = ", ".join(str(rank) for rank in sorted(ranks)) or "none"
        raise ValueError(
            f"{folder}: the {kind} files of some ranks are missing (ranks found: {found}); "
            "copy the shards of all ranks into one folder"
        )
    return [ranks[rank] for rank in range(len(ranks))]


def _tag_folder(folder: Path) -> Path:
    latest = folder / "latest"
    if not latest.is_file():
        raise ValueError(f"{folder}: no DeepSpeed checkpoint (no file `latest`)")
    tag = latest.read_text(encoding="utf-8", errors="replace").strip()
    if Path(tag).name != tag or not (folder / tag).is_dir():
        raise ValueError(f"{latest}: names {tag!r}, which is not a folder beside it")
    if (folder / tag).resolve().parent != folder.resolve():
        raise ValueError(f"{latest}: names {tag!r}, which is a link to another folder; copy it to its place")
    return folder / tag
