"""Tensors in files of torch.save, read in ranges: nothing of a file stays in memory.

Such a file is a zip of uncompressed records, one a storage, so a part of a tensor is a range of bytes. Mapping the
file (`torch.load(mmap=True)`) would keep every page that was looked at in the resident set.
"""

from __future__ import annotations

import bisect
import os
import struct
import threading
import zipfile
import zlib
from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from pipeline.checkpoints.crc import combine
from pipeline.checkpoints.pickles import load_shard

PIECE_BYTES = 8 * 2**20  # read at once
_LOCAL_HEADER = struct.Struct("<4s22xHH")  # signature, ..., lengths of the name and of the extra field


@dataclass(frozen=True)
class Record:
    """The bytes [start, start + size) of a file. crc: CRC-32 of them when they were written, if it was stored."""

    path: Path
    start: int
    size: int
    crc: int | None


@dataclass(frozen=True)
class Region:
    """Consecutive elements in a record. start: byte of the file where the first one lies."""

    record: Record
    start: int
    numel: int
    dtype: torch.dtype

    def cut(self, first: int, last: int) -> Region:
        """Elements [first, last) of it."""
        return Region(self.record, self.start + first * self.dtype.itemsize, last - first, self.dtype)


class TensorFile:
    """One file of torch.save.

    Attributes:
        contents: what it holds, tensors on the meta device.

    Raises:
        ValueError: as `load_shard`.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self.contents = load_shard(path, data=False)
        try:
            with zipfile.ZipFile(path) as archive:
                self._entries = sorted(archive.infolist(), key=lambda entry: entry.header_offset)
                self._summed = any(entry.CRC for entry in self._entries)  # all 0 after set_crc32_options(False)
                for entry in self._entries:
                    if self._summed and entry.filename.endswith("/data.pkl"):
                        archive.read(entry)  # holds it against its CRC-32
        except Exception as error:  # a damaged zip fails in many ways, by a name that is not UTF-8 too
            raise ValueError(_changed(path)) from error

    def locate(self, tensor: torch.Tensor) -> Region:
        """Where the elements of a tensor of `contents` lie, which must be contiguous.

        Raises:
            ValueError: they do not lie in one uncompressed record of the file.
        """
        start = getattr(tensor.untyped_storage(), "_checkpoint_offset", -1)
        place = bisect.bisect_left(self._entries, start, key=lambda entry: entry.header_offset) - 1
        entry = self._entries[max(place, 0)]
        with self._path.open("rb") as file:
            file.seek(entry.header_offset)
            signature, name, extra = _LOCAL_HEADER.unpack(file.read(_LOCAL_HEADER.size))
        record = Record(
            self._path,
            start=entry.header_offset + _LOCAL_HEADER.size + name + extra,
            size=entry.file_size,
            crc=entry.CRC if self._summed else None,
        )
        region = Region(
            record, start + int(tensor.storage_offset()) * tensor.element_size(), tensor.numel(), tensor.dtype
        )
        inside = start == record.start and region.start + tensor.nbytes <= start + record.size
        stored = signature == b"PK\x03\x04" and entry.compress_type == zipfile.ZIP_STORED
        if not inside or not stored or not tensor.is_contiguous():
            raise ValueError(f"{self._path}: where a tensor lies in it cannot be told ({entry.filename}); damaged")
        return region


def _changed(path: Path) -> str:
    return f"{path}: its content is not what was written (CRC-32); use another checkpoint"


class RegionReader:
    """Reads regions, from any number of threads, and checks at the end that their records are what was written."""

    def __init__(self) -> None:
        self._threads = threading.local()
        self._adding = threading.Lock()
        # By record, the pieces read: [start, end) of the file and CRC-32.
        self._pieces: dict[Record, set[tuple[int, int, int]]] = defaultdict(set)

    def read(self, regions: Iterable[Region]) -> Iterator[torch.Tensor]:
        """Yields the elements of the regions in order, flat, in pieces; the next one overwrites the last.

        Raises:
            ValueError: the file ends before the region does.
        """
        for region in regions:
            with region.record.path.open("rb", buffering=0) as file:
                for start, piece in self._read_bytes(file.fileno(), region):
                    self._add(region.record, start, piece)
                    yield piece.view(region.dtype)

    def check(self, more: Iterable[Region] = ()) -> None:
        """Holds every record that was read from, and those of `more`, against its CRC-32. What was not read of it is
        read now: padding, or what an interrupted conversion had read before.

        Raises:
            ValueError: a record is not what was written, by file.
        """
        for region in more:
            self._pieces.setdefault(region.record, set())
        for record in sorted(self._pieces, key=lambda record: (record.path, record.start)):
            if record.crc is not None and self._crc(record) != record.crc:
                raise ValueError(_changed(record.path))

    def _crc(self, record: Record) -> int:
        crc, place = 0, record.start
        for start, end, piece in sorted(self._pieces[record]):
            if start < place:
                continue  # read twice, over other bounds
            crc = combine(self._crc_between(record, place, start, crc), piece, end - start)
            place = end
        return self._crc_between(record, place, record.start + record.size, crc)

    def _crc_between(self, record: Record, start: int, end: int, crc: int) -> int:
        if start == end:
            return crc
        with record.path.open("rb", buffering=0) as file:
            for _, piece in self._read_bytes(file.fileno(), Region(record, start, end - start, torch.uint8)):
                crc = zlib.crc32(piece.numpy().data, crc)
        return crc

    def _add(self, record: Record, start: int, piece: torch.Tensor) -> None:
        crc = zlib.crc32(piece.numpy().data)
        with self._adding:
            self._pieces[record].add((start, start + len(piece), crc))

    def _read_bytes(self, file: int, region: Region) -> Iterator[tuple[int, torch.Tensor]]:
        """(place in the file, bytes) of the region's pieces."""
        if not hasattr(self._threads, "buffer"):
            self._threads.buffer = torch.empty(PIECE_BYTES, dtype=torch.uint8)
        end = region.start + region.numel * region.dtype.itemsize
        for start in range(region.start, end, PIECE_BYTES):
            piece: torch.Tensor = self._threads.buffer[: min(PIECE_BYTES, end - start)]
            rest, place = piece.numpy().data, start
            while rest:
                count = os.preadv(file, [rest], place)
                if not count:
                    raise ValueError(f"{region.record.path}: ends before the tensors it lists; use another checkpoint")
                rest, place = rest[count:], place + count
            yield start, piece
