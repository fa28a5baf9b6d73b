"""The folder of the subspaces, one file a map: what a killed run found is kept, and a grid reads what one found."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import torch
from filelock import FileLock, Timeout
from safetensors.torch import save_file

from pipeline.checkpoints.folders import sync
from pipeline.checkpoints.weights_in import SafetensorsFile
from pipeline.realignment.maps import LinearMap
from pipeline.realignment.spectrum import Spectrum
from pipeline.realignment.subspace import Subspace
from pipeline.report.files import write_bytes

_RECORD = "source.json"


class Bases:
    """Subspaces by map, in a private folder.

    Args:
        source: what they are computed from, which the folder remembers.
        named: the user named the folder: what it holds of another source is not thrown away.

    Raises:
        ValueError: a named folder holds those of another source or something else; or it cannot be written.
    """

    def __init__(self, folder: Path, source: str, *, named: bool) -> None:
        self.folder = folder
        try:
            if folder.is_dir() and not self._is_of(source):
                if named:
                    raise ValueError(
                        f"--work_dir {folder}: holds something else, or subspaces of another safe model, other "
                        "anchors or other settings; choose another folder or remove this one"
                    )
                shutil.rmtree(folder)
            folder.mkdir(parents=True, exist_ok=True, mode=0o700)
            write_bytes(folder / _RECORD, json.dumps({"source": source}).encode())
        except OSError as error:
            raise ValueError(f"--work_dir {folder}: cannot be written: {error.strerror}") from error

    def _is_of(self, source: str) -> bool:
        record = self.folder / _RECORD
        if record.is_file():
            return record.read_text(encoding="utf-8", errors="replace") == json.dumps({"source": source})
        return not any(each.suffix != ".tmp" for each in self.folder.iterdir())

    def lock(self) -> FileLock:
        """Held while subspaces are computed. Errors: ValueError if another process holds it."""
        lock = FileLock(self.folder / "computing.lock")
        try:
            lock.acquire(timeout=0)
        except Timeout:
            raise ValueError(
                f"--work_dir {self.folder}: another process is computing there; wait for it or end it"
            ) from None
        return lock

    def store(self, key: LinearMap, found: Subspace | None) -> None:
        """Keeps the subspace of a map, or that its outputs do not move at all."""
        if found is None:
            tensors = {"numbers": torch.zeros(4, dtype=torch.float64)}
        else:
            spectrum = found.spectrum
            numbers = [spectrum.energy, spectrum.n, found.tokens, found.dead]
            tensors = {
                "numbers": torch.tensor(numbers, dtype=torch.float64),
                "sigma": spectrum.sigma.double(),
                "vectors": found.vectors,
            }
        path = self._path(key)
        temporary = path.with_name(f"{path.name}.tmp")
        save_file(tensors, temporary)
        sync(temporary)
        temporary.rename(path)

    def decided(self, key: LinearMap, eta: float) -> bool:
        """Whether the rank for `eta` is known, and its directions are there."""
        if not self._path(key).is_file():
            return False
        spectrum = self.spectrum(key)
        if spectrum is None:
            return True
        rank = spectrum.rank(eta)
        return rank is not None and rank <= self._file(key).specs["vectors"].shape[0]

    def spectrum(self, key: LinearMap) -> Spectrum | None:
        """The singular values that were computed; None if the outputs do not move."""
        energy, n, *_ = self._numbers(key)
        return Spectrum(_read(self._file(key), "sigma"), energy, int(n)) if energy else None

    def counts(self, key: LinearMap) -> tuple[int, int]:
        """Tokens, and neurons that do not move."""
        _, _, tokens, dead = self._numbers(key)
        return int(tokens), int(dead)

    def directions(self, key: LinearMap, rank: int) -> torch.Tensor:
        """U_r^T, fp32 [rank, rows]."""
        file = self._file(key)
        rows = file.specs["vectors"].shape[1]
        found = torch.empty(rank, rows)
        # Row by row is range by range: directions beyond the rank are not read.
        for row, piece in zip(found, file.read("vectors", length=rows), strict=False):
            row.copy_(piece)
        return found

    def _numbers(self, key: LinearMap) -> list[float]:
        return [float(each) for each in _read(self._file(key), "numbers")]

    def _file(self, key: LinearMap) -> SafetensorsFile:
        return SafetensorsFile(self._path(key))

    def _path(self, key: LinearMap) -> Path:
        return self.folder / f"{key.key}.safetensors"


def _read(file: SafetensorsFile, name: str) -> torch.Tensor:
    return torch.cat([piece.clone() for piece in file.read(name)])
