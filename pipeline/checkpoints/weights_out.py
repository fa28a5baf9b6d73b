"""Safetensors files written as a stream: split, named and laid out as save_pretrained does, byte for byte.

The safetensors library wants all tensors of a file in memory. The format is small: the length of the header (8 bytes,
little-endian), the header (JSON, padded with spaces to a multiple of 8), the tensors' bytes.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch
from huggingface_hub import split_state_dict_into_shards_factory

from pipeline.checkpoints.checksums import FileSum
from pipeline.checkpoints.direct_file import DirectFile, aligned_buffer

PIECE_BYTES = 32 * 2**20  # written at once; a worker holds two of them

# The names of the format. Files hold the tensors of the last of these types first, by name within a type.
_TYPE_NAMES = {
    torch.bool: "BOOL",
    torch.uint8: "U8",
    torch.int8: "I8",
    torch.int16: "I16",
    torch.uint16: "U16",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int32: "I32",
    torch.uint32: "U32",
    torch.float32: "F32",
    torch.float64: "F64",
    torch.int64: "I64",
    torch.uint64: "U64",
}
TYPES = {name: dtype for dtype, name in _TYPE_NAMES.items()}
_ORDER = {dtype: -place for place, dtype in enumerate(_TYPE_NAMES)}

# Reads a tensor by name: its elements in order, flattened, in pieces of any length. A piece may be overwritten by its
# reader once the next one is asked for. Called from several threads at once when there are several workers.
Reader = Callable[[str], Iterable[torch.Tensor]]


@dataclass(frozen=True)
class TensorSpec:
    """One tensor as it is written."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def numel(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        """Size in the file."""
        return self.numel * self.dtype.itemsize


@dataclass(frozen=True)
class WeightsFile:
    """One safetensors file to be written: its name and its tensors in the order of the file."""

    name: str
    specs: tuple[TensorSpec, ...]
    metadata: Mapping[str, str]

    @cached_property
    def header(self) -> bytes:
        """Everything before the tensors' bytes."""
        entries: dict[str, object] = {"__metadata__": dict(self.metadata)} if self.metadata else {}
        end = 0
        for spec in self.specs:
            start, end = end, end + spec.nbytes
            entries[spec.name] = {
                "dtype": _TYPE_NAMES[spec.dtype],
                "shape": list(spec.shape),
                "data_offsets": [start, end],
            }
        text = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode()
        text += b" " * (-len(text) % 8)
        return len(text).to_bytes(8, "little") + text

    @property
    def nbytes(self) -> int:
        """Size of the file."""
        return len(self.header) + sum(spec.nbytes for spec in self.specs)

    def begins(self, path: Path) -> bool:
        """Whether the file at `path` has this size and this header."""
        if not path.is_file() or path.stat().st_size != self.nbytes:
            return False
        with path.open("rb") as file:
            return file.read(len(self.header)) == self.header


def plan_files(
    specs: Sequence[TensorSpec], *, max_shard_size: int | str | None, stem: str, metadata: Mapping[str, str]
) -> list[WeightsFile]:
    """Splits tensors, given in the model's order, over files as save_pretrained would.

    Args:
        max_shard_size: bytes, or a text such as "5GB"; None writes one file. A larger tensor has a file of its own.
        stem: `model` gives model.safetensors, or model-00001-of-0000N.safetensors.

    Raises:
        ValueError: `max_shard_size` is no size.
    """
    by_name = {spec.name: spec for spec in specs}
    assert len(by_name) == len(specs), "a tensor is named twice"
    try:
        split = split_state_dict_into_shards_factory(
            by_name,
            get_storage_size=lambda spec: spec.nbytes,
            filename_pattern=stem + "{suffix}.safetensors",
            max_shard_size=sum(spec.nbytes for spec in specs) + 1 if max_shard_size is None else max_shard_size,
        )
    except ValueError as error:
        raise ValueError(f"--max_shard_size {max_shard_size}: {error}; give for example 5GB") from None
    files = []
    for name, tensors in split.filename_to_tensors.items():
        ordered = sorted((by_name[each] for each in tensors), key=lambda spec: (_ORDER[spec.dtype], spec.name))
        files.append(WeightsFile(name, tuple(ordered), metadata))
    return files


def index_of(files: Sequence[WeightsFile]) -> str:
    """The text of the index that goes with several files."""
    specs = [spec for file in files for spec in file.specs]
    index = {
        "metadata": {
            "total_parameters": sum(spec.numel for spec in specs),
            "total_size": sum(spec.nbytes for spec in specs),
        },
        "weight_map": {spec.name: file.name for file in files for spec in file.specs},
    }
    return json.dumps(index, indent=2, sort_keys=True) + "\n"


def write_file(file: WeightsFile, path: Path, read: Reader, *, written: Callable[[int], None]) -> FileSum:
    """Writes `file` at `path` and syncs it; hashing and writing one block goes on while the next one is read.

    written: told the bytes of each block; what it raises ends the writing.

    Raises:
        ValueError: a tensor is not finite or does not have its number of elements, by name.
        OSError: from the file.
    """
    digest = hashlib.sha256()
    with DirectFile(path) as out, ThreadPoolExecutor(2) as beside:
        pending: list[Future[None]] = []
        for block in _blocks(file, read):
            for each in pending:
                each.result()  # so that the other buffer, which is filled next, is free again
            pending = [beside.submit(out.write, block), beside.submit(digest.update, block)]
            written(len(block))
        for each in pending:
            each.result()
        out.sync()
    return FileSum(file.nbytes, digest.hexdigest())


def _blocks(file: WeightsFile, read: Reader) -> Iterator[memoryview]:
    """The file's bytes, in two buffers by turns, which are full but for the last one."""
    buffers = [torch.frombuffer(aligned_buffer(PIECE_BYTES), dtype=torch.uint8) for _ in range(2)]
    turn = used = 0
    for part, spec in _parts(file, read):
        rest = part
        while len(rest):
            room = buffers[turn][used:].view(spec.dtype if spec else torch.uint8)
            count = min(len(room), len(rest))
            cast = room[:count].copy_(rest[:count])
            if spec:
                _check_finite(cast, rest[:count], spec)
            rest = rest[count:]
            used += cast.nbytes
            if used == PIECE_BYTES:
                yield buffers[turn].numpy().data
                turn, used = 1 - turn, 0
    if used:
        yield buffers[turn][:used].numpy().data


def _parts(file: WeightsFile, read: Reader) -> Iterator[tuple[torch.Tensor, TensorSpec | None]]:
    """The header, then the tensors as they are read, flat, each with what it is written as."""
    yield torch.frombuffer(bytearray(file.header), dtype=torch.uint8), None
    for spec in file.specs:
        seen = 0
        for chunk in read(spec.name):
            yield chunk.flatten(), spec
            seen += chunk.numel()
        if seen != spec.numel:
            raise ValueError(f"{spec.name}: {seen} elements were read, {spec.numel} are expected")


def _check_finite(cast: torch.Tensor, source: torch.Tensor, spec: TensorSpec) -> None:
    if not spec.dtype.is_floating_point or _is_finite(cast):
        return
    if _is_finite(source):
        raise ValueError(f"{spec.name}: holds values that are too large for {_TYPE_NAMES[spec.dtype]}; choose fp32")
    raise ValueError(f"{spec.name}: holds values that are not finite (NaN or infinity); the weights are broken")


def _is_finite(values: torch.Tensor) -> bool:
    # A sum is a faster look than isfinite, and not finite if any value is not; a finite sum may overflow.
    return bool(values.sum(dtype=torch.float32).isfinite()) or bool(values.isfinite().all())
