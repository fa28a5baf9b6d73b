"""Safetensors files and folders of them, read in ranges: no tensor is held whole, no page of a file stays mapped."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from pipeline.checkpoints.weights_out import PIECE_BYTES, TYPES, TensorSpec

INDEX = "model.safetensors.index.json"
WEIGHTS = "model.safetensors"
_MAX_HEADER = 100_000_000  # bytes, as the safetensors library has it


class SafetensorsFile:
    """One file.

    Attributes:
        specs: its tensors by name, in the order of their bytes.

    Raises:
        ValueError: it is damaged or truncated, or holds a type that is not read here.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            with path.open("rb") as file:
                length = int.from_bytes(file.read(8), "little")
                if length > _MAX_HEADER:
                    raise ValueError(f"its header would have {length} bytes")
                entries: dict[str, Any] = json.loads(file.read(length))
                size = os.fstat(file.fileno()).st_size
            entries.pop("__metadata__", None)
            places = sorted((_offsets(entry), name) for name, entry in entries.items())
            self.specs: dict[str, TensorSpec] = {name: _spec(name, entries[name]) for _, name in places}
            self._starts = {name: 8 + length + start for (start, _), name in places}
            end = 0
            for (start, stop), name in places:
                if start != end or stop - start != self.specs[name].nbytes:
                    raise ValueError(f"{name} does not lie where its header says")
                end = stop
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"{path}: not a safetensors file: {error}") from error
        except OSError as error:
            raise ValueError(f"{path}: {error.strerror}") from error
        if size != 8 + length + end:
            raise ValueError(f"{path}: has {size} bytes instead of {8 + length + end}; it is truncated or damaged")

    def read(self, name: str, *, length: int | None = None) -> Iterator[torch.Tensor]:
        """Yields a tensor's elements in order, flat, in pieces that are overwritten when the next is asked for.

        length: elements of a piece, the last but one.

        Raises:
            ValueError: the file has become shorter.
        """
        spec = self.specs[name]
        length = length or PIECE_BYTES // spec.dtype.itemsize
        buffer = torch.empty(min(length, spec.numel), dtype=spec.dtype)
        with self.path.open("rb", buffering=0) as file:
            file.seek(self._starts[name])
            for start in range(0, spec.numel, length):
                piece = buffer[: min(length, spec.numel - start)]
                rest = piece.view(torch.uint8).numpy().data
                while rest:
                    count = file.readinto(rest)
                    if not count:
                        raise ValueError(f"{self.path}: ends within {name}; it was changed while it was read")
                    rest = rest[count:]
                yield piece

    def load(self, name: str) -> torch.Tensor:
        """A whole tensor, in fp32."""
        spec = self.specs[name]
        pieces = [piece.to(torch.float32, copy=True) for piece in self.read(name)]
        return torch.cat(pieces).view(spec.shape) if pieces else torch.empty(spec.shape)


class WeightsFolder:
    """The weights of a Hugging Face model folder, in one file or several with an index.

    Attributes:
        files: the files, in the order of their names.
        specs: all tensors by name, in the order of the files.

    Raises:
        ValueError: there are none, or only pickles; a file is missing or damaged; the index names a file outside the
            folder or does not fit the files.
    """

    def __init__(self, folder: Path) -> None:
        names = _file_names(folder)
        self.files = [SafetensorsFile(folder / name) for name in sorted(set(names.values()) or {WEIGHTS})]
        self._file_of = {name: file for file in self.files for name in file.specs}
        self.specs = {name: spec for file in self.files for name, spec in file.specs.items()}
        if len(self.specs) != sum(len(file.specs) for file in self.files):
            raise ValueError(f"{folder}: a tensor is in two of its safetensors files")
        wrong = [
            name for name, file in names.items() if name not in self.specs or self._file_of[name].path.name != file
        ]
        if names and (wrong or len(names) != len(self.specs)):
            shown = ", ".join(sorted(wrong or self.specs.keys() - names.keys())[:5])
            raise ValueError(f"{folder / INDEX}: does not fit the files beside it ({shown})")

    def read(self, name: str, *, length: int | None = None) -> Iterator[torch.Tensor]:
        """As `SafetensorsFile.read`."""
        return self._file_of[name].read(name, length=length)


def _file_names(folder: Path) -> dict[str, str]:
    """The index: file by tensor; empty where there is one file without an index."""
    index = folder / INDEX
    if not index.is_file():
        if (folder / WEIGHTS).is_file():
            return {}
        pickles = [*folder.glob("*.bin"), *folder.glob("*.pt")]
        reason = f"only {pickles[0].name}, a pickle, which is not read: save it as safetensors" if pickles else "none"
        raise ValueError(f"{folder}: no weights in safetensors ({WEIGHTS} or {INDEX}); {reason}")
    try:
        names = {str(name): str(file) for name, file in json.loads(index.read_text("utf-8"))["weight_map"].items()}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{index}: damaged index ({error!r})") from None
    for file in set(names.values()):
        if Path(file).name != file or not file.endswith(".safetensors"):
            raise ValueError(f"{index}: names {file!r}, which is no safetensors file in its folder")
    return names


def _offsets(entry: dict[str, Any]) -> tuple[int, int]:
    start, stop = map(int, entry["data_offsets"])
    return start, stop


def _spec(name: str, entry: dict[str, Any]) -> TensorSpec:
    if entry["dtype"] not in TYPES:
        raise ValueError(f"{name} is of type {entry['dtype']}, which is not read here (a quantised model?)")
    return TensorSpec(name, tuple(map(int, entry["shape"])), TYPES[entry["dtype"]])
