"""An output folder of weights that is there whole or not at all, and whose making can be interrupted and continued."""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import os
import shutil
import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import asdict
from pathlib import Path
from types import MappingProxyType, TracebackType

from pipeline.checkpoints.byte_progress import ByteProgress
from pipeline.checkpoints.checksums import FileSum, write_manifest
from pipeline.checkpoints.folders import sync, unfinished
from pipeline.checkpoints.weights_out import (
    Reader,
    TensorSpec,
    WeightsFile,
    index_of,
    plan_files,
    write_file,
)
from pipeline.threads import one_torch_thread

_RECORD = ".finished.jsonl"  # first line: the source; then a line for each finished file of weights
_UNWRITABLE = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS}
_FORMAT = MappingProxyType({"format": "pt"})


def fingerprint(files: Iterable[Path], *options: object) -> str:
    """Identifies inputs by path, size and time of change, and the options (by their repr) with which they are used."""
    stats = [(str(path.resolve()), path.stat().st_size, path.stat().st_mtime_ns) for path in sorted(files)]
    return hashlib.sha256(repr((stats, options)).encode()).hexdigest()


class NoSpace(ValueError):
    """The disk is too full, or cannot be written."""


class OutFolder:
    """One output folder being made, as a context manager.

    Files are written into `.NAME.partial` beside `out`, and `finish` renames that to `out`. What a killed process, a
    full disk or an interrupt left there is continued from its last finished file of weights if `source` is the same,
    and thrown away if not. Any other ValueError, which the next attempt would meet again, leaves nothing.

    Args:
        out: absent or an empty folder.
        source: says what is written (`fingerprint`); two with one source write the same files.
        private: for its owner only (mode 700), from the start.

    Attributes:
        folder: where files are written now; the caller puts what is not weights there.

    Raises:
        ValueError: `out` holds something, cannot be written, or is being written by another process.
    """

    def __init__(self, out: Path, *, source: str, private: bool) -> None:
        _require_free(out)
        self._out = out.resolve()
        self.folder = unfinished(self._out)
        self._source = f"{source}, private" if private else source
        self._stop = threading.Event()
        self._recording = threading.Lock()
        try:
            self._out.parent.mkdir(parents=True, exist_ok=True)
            self._lock = _Lock(self._out.with_name(f".{self._out.name}.lock"))
            try:
                self._open(private)
            except BaseException:
                self._lock.release()
                raise
        except OSError as error:
            raise ValueError(f"{out}: cannot be written: {error.strerror}; choose another OUT") from error
        self._needed = 0

    def __enter__(self) -> OutFolder:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        keep = bool(self._finished) and (isinstance(error, NoSpace) or not isinstance(error, ValueError))
        if not keep:
            shutil.rmtree(self.folder, ignore_errors=True)
        self._lock.release()
        if isinstance(error, OSError) and error.errno in _UNWRITABLE:
            left = "its finished files are kept for the next attempt" if keep else "nothing was left behind"
            raise NoSpace(f"{self._out}: {error.strerror}: {self._room()}; {left}") from error

    def write_weights(
        self,
        specs: Sequence[TensorSpec],
        read: Reader,
        *,
        max_shard_size: int | str | None,
        workers: int = 1,
        stem: str = "model",
        metadata: Mapping[str, str] = _FORMAT,
    ) -> None:
        """Writes tensors as safetensors files, split as `plan_files` says, with an index if there are several. Shows
        bytes, speed and the time that is left.

        Args:
            specs: in the model's order.
            workers: threads, each writing one file at a time with 64 MiB of buffers.

        Raises:
            ValueError: no such size or number of workers; not enough free space; a tensor that is not finite or has
                another number of elements, by name.
        """
        if workers < 1:
            raise ValueError(f"--workers {workers}: give at least 1")
        files = plan_files(specs, max_shard_size=max_shard_size, stem=stem, metadata=metadata)
        missing = [file for file in files if not self._is_finished(file)]
        total, self._needed = (sum(file.nbytes for file in each) for each in (files, missing))
        if self._needed > shutil.disk_usage(self.folder).free:
            raise NoSpace(f"{self._out}: {self._room()}")

        with (
            ByteProgress(total=total, done=total - self._needed) as progress,
            one_torch_thread(),  # ours read, hash and write beside each other; those of a cast would only spin
            ThreadPoolExecutor(workers) as pool,
        ):

            def written(count: int) -> None:
                if self._stop.is_set():
                    raise InterruptedError  # another file failed, and its error is the one that is shown
                with self._recording:
                    progress.update(count)

            try:
                for future in as_completed([pool.submit(self._write, file, read, written) for file in missing]):
                    future.result()
            except BaseException:
                self._stop.set()
                pool.shutdown(cancel_futures=True)
                raise
        if len(files) > 1:
            (self.folder / f"{stem}.safetensors.index.json").write_text(index_of(files), encoding="utf-8")

    def finish(self) -> None:
        """Writes MANIFEST.json, gives the files the folder's permissions and renames the folder to `out`."""
        record = self.folder / _RECORD
        write_manifest(self.folder, self._finished, skip=_RECORD)
        mode = self.folder.stat().st_mode & 0o666
        for path in self.folder.rglob("*"):
            if path.is_file():
                path.chmod(mode)
            sync(path)
        record.unlink()
        sync(self.folder)
        try:
            self.folder.rename(self._out)
        except OSError as error:
            raise ValueError(f"{self._out}: cannot be put there: {error.strerror}; choose another OUT") from error
        sync(self._out.parent)

    def _open(self, private: bool) -> None:
        """Makes the folder, or takes over what an interrupted attempt finished in it."""
        self._finished = self._read_record()
        if not self._finished:
            _remove(self.folder)
            self.folder.mkdir(mode=0o700 if private else 0o777)
        for path in self.folder.iterdir():
            if path.name not in self._finished:
                _remove(path)
        lines = [{"source": self._source}, *({"name": name, **asdict(each)} for name, each in self._finished.items())]
        (self.folder / _RECORD).write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")

    def _read_record(self) -> dict[str, FileSum]:
        """The finished files of an attempt with the same source; none if there was no such attempt."""
        finished: dict[str, FileSum] = {}
        record = self.folder / _RECORD
        if self.folder.is_symlink() or not record.is_file():
            return finished
        first, *lines = record.read_text(encoding="utf-8", errors="replace").split("\n")
        if first != json.dumps({"source": self._source}):
            return finished
        for line in lines:
            try:
                fields = json.loads(line)
            except ValueError:  # torn, the last one
                break
            finished[fields["name"]] = FileSum(fields["bytes"], fields["sha256"])
        return finished

    def _is_finished(self, file: WeightsFile) -> bool:
        return file.name in self._finished and file.begins(self.folder / file.name)

    def _write(self, file: WeightsFile, read: Reader, written: Callable[[int], None]) -> None:
        temporary = self.folder / f"{file.name}.tmp"
        done = write_file(file, temporary, read, written=written)
        temporary.rename(self.folder / file.name)
        with self._recording, (self.folder / _RECORD).open("a", encoding="utf-8") as record:
            record.write(json.dumps({"name": file.name, **asdict(done)}) + "\n")
            record.flush()
            os.fsync(record.fileno())
            self._finished[file.name] = done

    def _room(self) -> str:
        free = shutil.disk_usage(self._out.parent).free
        return (
            f"{self._needed} bytes ({self._needed / 1e9:.2f} GB) of weights are to be written and {free} "
            f"({free / 1e9:.2f} GB) are free; make room or choose another OUT"
        )


class _Lock:
    """A file that one process at a time holds; gone when it is released."""

    def __init__(self, path: Path) -> None:
        self._path = path
        while True:
            self._handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o600)
            try:
                fcntl.flock(self._handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
                # Whoever held it may have removed it since it was opened: then what is locked is no file any more.
                if path.exists() and os.path.samestat(os.fstat(self._handle), path.stat()):
                    return
            except BlockingIOError:
                os.close(self._handle)
                raise ValueError(f"{path}: another process is writing this folder; wait for it or end it") from None
            os.close(self._handle)

    def release(self) -> None:
        self._path.unlink(missing_ok=True)
        os.close(self._handle)


def _require_free(out: Path) -> None:
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ValueError(f"{out}: exists and is not an empty folder; choose another OUT or remove it")
    if out.is_mount():
        raise ValueError(f"{out}: is where a disk is mounted, which cannot be replaced; name a folder in it")


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
