"""The folders that training writes to: there, writable, large and fast enough, the same one on every node."""

from __future__ import annotations

import os
import random
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from pipeline.doctor.finding import FAILED, OK, WARNING, Finding, Level, size

TEST_BYTES = 256 << 20
TEST_SECONDS = 10.0  # of writing, on a disk so slow that the whole file would hold up the job
BLOCK = 8 << 20
SYNC_EVERY = 4  # blocks
SLOW_DISK = 50e6  # bytes a second; the states of an 8B model, 112 GB, then take over half an hour a save
CLOCK_TOLERANCE = 2.0  # seconds
SHARED_SECONDS = 10.0  # network file systems show a new file to other clients after a few seconds
NETWORK = (
    "nfs",
    "lustre",
    "gpfs",
    "beegfs",
    "ceph",
    "cifs",
    "smb",
    "glusterfs",
    "panfs",
    "wekafs",
    "9p",
    "fuse.sshfs",
)

CHECKPOINT_SPACE = (2e9, 20e9)  # bytes: failed below the first, warning below the second
CACHE_SPACE = (50e6, 2e9)
LONGEST_BUILD = 1800.0  # seconds; compiling one operator takes a few minutes


def output_dir(folder: Path) -> Iterator[Finding]:
    """The folder of checkpoints: space, then writing, reading back and the file system's clock, with a real file."""
    where = existing(folder)
    finding = _space("output_dir", folder, where, CHECKPOINT_SPACE, "tools/plan.py says what a checkpoint takes")
    yield finding
    if finding.level != FAILED:
        yield from _written(where)


def caches() -> Iterator[Finding]:
    """The folders of downloads and compiled kernels, and the one for temporary files."""
    home = Path.home() / ".cache"
    hub_home = os.environ.get("HF_HOME") or f"{os.environ.get('XDG_CACHE_HOME') or home}/huggingface"
    for name, folder, compiled in (
        ("hub cache (HF_HUB_CACHE)", os.environ.get("HF_HUB_CACHE") or f"{hub_home}/hub", False),
        ("temporary files (TMPDIR)", tempfile.gettempdir(), False),
        ("TRITON_CACHE_DIR", os.environ.get("TRITON_CACHE_DIR") or "~/.triton/cache", True),
        ("TORCH_EXTENSIONS_DIR", os.environ.get("TORCH_EXTENSIONS_DIR") or f"{home}/torch_extensions", True),
    ):
        yield _cache(name, Path(folder).expanduser(), compiled)


def _cache(name: str, folder: Path, compiled: bool) -> Finding:
    """compiled: whether programs are loaded from it, by every rank, under locks."""
    where = existing(folder)
    finding = _space(name, folder, where, CACHE_SPACE, "point it to another disk")
    if finding.level != OK:
        return finding
    with _scratch(where) as descriptor:
        os.write(descriptor, b"x")
    if compiled and os.statvfs(where).f_flag & os.ST_NOEXEC:
        found = f"{folder} is mounted noexec, and compiled kernels are loaded from it"
        return Finding(name, FAILED, found, f"export {name}=... on a disk that allows it")
    if compiled and file_system(where).startswith(NETWORK):
        found = f"{finding.found}: the ranks of all nodes would wait for each other's locks"
        return Finding(name, WARNING, found, f"export {name}=... on a disk of the node")
    if compiled and (left := _old_locks(where)):
        files = " ".join(map(str, left))
        found = f"{files}: left by a process that died while it compiled; every later one waits for it"
        return Finding(name, WARNING, found, f"rm {files}")
    return finding


def _old_locks(folder: Path) -> list[Path]:
    """Build locks of torch's extensions (a file each, without an owner) that are older than any build takes."""
    locks = [*folder.glob("*/lock"), *folder.glob("*/*/lock")]
    return [each for each in locks if time.time() - each.stat().st_mtime > LONGEST_BUILD]


def hub_offline() -> Iterator[Finding]:
    """Whether the hub is asked for files."""
    names = ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE", "HF_DATASETS_OFFLINE")
    on = [name for name in names if os.environ.get(name, "").upper() in ("1", "ON", "YES", "TRUE")]
    found = f"off ({', '.join(on)}): models and data are folders, or in the cache" if on else "may be asked for files"
    yield Finding("hub", OK, found)


def existing(folder: Path) -> Path:
    """The folder itself, or the nearest one above it that is there."""
    folder = folder.expanduser().absolute()
    return next(each for each in (folder, *folder.parents) if os.path.lexists(each))


def file_system(folder: Path) -> str:
    """The type of the file system that holds a folder, such as ext4 or nfs4."""
    best, kind = "", "unknown"
    for line in Path("/proc/mounts").read_text(encoding="utf-8").splitlines():
        _, point, found, *_ = line.split(" ")
        if folder.resolve().is_relative_to(point) and len(point) >= len(best):
            best, kind = point, found
    return kind


def _space(name: str, folder: Path, where: Path, bounds: tuple[float, float], remedy: str) -> Finding:
    """Whether files can be made in a folder at all, and how many bytes."""
    if not where.is_dir():
        found = f"{where} is not a folder" if where.exists() else f"{where} is a link to nothing"
        return Finding(name, FAILED, found, "name a folder that can be made")
    try:
        with _scratch(where):
            pass
    except OSError as error:
        return Finding(name, FAILED, f"{folder} cannot be written: {error.strerror}", "name a folder you may write to")
    state = os.statvfs(where)
    free = state.f_bavail * state.f_frsize
    found = f"{size(free)} free in {folder} ({file_system(where)})"
    least, wanted = bounds
    level: Level = FAILED if free < least else WARNING if free < wanted else OK
    if state.f_files and not state.f_favail:
        level, found = FAILED, f"{found}, and no inode"
    return Finding(name, level, found, remedy if level != OK else "")


@contextmanager
def _scratch(where: Path) -> Iterator[int]:
    """A new file without a name, so that nothing stays behind however this process ends."""
    with tempfile.TemporaryFile(dir=where, buffering=0) as file:
        yield file.fileno()


def _written(where: Path) -> Iterator[Finding]:
    """Write a file through to the disk, read it back and compare."""
    state = os.statvfs(where)
    blocks = min(TEST_BYTES, state.f_bavail * state.f_frsize // 4) // BLOCK
    block = bytearray(random.Random(0).randbytes(BLOCK))  # a disk that compresses gains nothing
    with _scratch(where) as descriptor:
        start = time.monotonic()
        done = 0
        while done < blocks and time.monotonic() - start < TEST_SECONDS:
            block[:8] = done.to_bytes(8, "little")
            try:
                _write_all(descriptor, block)
                if done % SYNC_EVERY == SYNC_EVERY - 1 or done == blocks - 1:
                    os.fsync(descriptor)
            except OSError as error:
                found = f"{error.strerror} after {size(done * BLOCK)}"
                yield Finding("write speed", FAILED, found, "is a quota used up?")
                return
            done += 1
        written = done * BLOCK / (time.monotonic() - start)
        skew = os.fstat(descriptor).st_mtime - time.time()
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)  # so that reading goes to the disk
        os.lseek(descriptor, 0, os.SEEK_SET)
        start = time.monotonic()
        for index in range(done):
            block[:8] = index.to_bytes(8, "little")
            if _read_all(descriptor, BLOCK) != block:
                found = f"block {index} of {size(BLOCK)} read back otherwise than written"
                yield Finding("write speed", FAILED, found, "do not keep anything on this disk")
                return
        read = done * BLOCK / (time.monotonic() - start)
    found = f"{size(written)}/s to the disk, {size(read)}/s back, {size(done * BLOCK)} equal"
    slow = written < SLOW_DISK
    remedy = "a faster --output_dir: every save waits for it" if slow else ""
    yield Finding("write speed", WARNING if slow else OK, found, remedy, rates={"write speed in MB/s": written / 1e6})
    if abs(skew) > CLOCK_TOLERANCE:
        found = f"{abs(skew):.0f} s {'behind' if skew > 0 else 'ahead of'} the file system of output_dir"
        yield Finding("clock", WARNING, found, "synchronise the clocks (chrony, ntp)")
    else:
        yield Finding("clock", OK, "agrees with the file system of output_dir")


def _write_all(descriptor: int, block: bytearray) -> None:
    view = memoryview(block)
    while view:
        view = view[os.write(descriptor, view) :]


def _read_all(descriptor: int, count: int) -> bytes:
    parts = []
    while count and (part := os.read(descriptor, count)):
        parts.append(part)
        count -= len(part)
    return b"".join(parts)


@contextmanager
def token(folder: Path) -> Iterator[str]:
    """A file that other nodes look for, by its name; gone afterwards. Errors: OSError where it cannot be made."""
    path = existing(folder) / f".doctor-token-{os.urandom(8).hex()}"
    path.touch(exist_ok=False)
    try:
        yield path.name
    finally:
        path.unlink()


def shared(folder: Path, name: str) -> Iterator[Finding]:
    """Whether the token that rank 0 left is in this node's folder too."""
    where = existing(folder)
    deadline = time.monotonic() + SHARED_SECONDS
    while name not in os.listdir(where):
        if time.monotonic() > deadline:
            found = f"{folder} is another folder here than on the node of rank 0"
            yield Finding("shared output_dir", FAILED, found, "name a folder of a file system that all nodes mount")
            return
        time.sleep(0.2)
    yield Finding("shared output_dir", OK, "the one of rank 0")
