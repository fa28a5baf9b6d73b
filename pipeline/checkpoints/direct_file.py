"""A file written once from its start to its end, past the page cache where the file system can.

A copy of every byte into the page cache costs more than hashing it, and would push out what other jobs of the node
keep there.
"""

from __future__ import annotations

import errno
import fcntl
import mmap
import os
from pathlib import Path
from types import TracebackType

BLOCK = 4096  # bytes; what direct writes are aligned to, in the file, in memory and in length


def aligned_buffer(size: int) -> mmap.mmap:
    """Memory for direct writes: whole pages."""
    return mmap.mmap(-1, size)


class DirectFile:
    """Errors: OSError from the file."""

    def __init__(self, path: Path) -> None:
        flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC
        try:
            self._file = os.open(path, flags | os.O_DIRECT, 0o666)
        except OSError as error:
            if error.errno != errno.EINVAL:  # a file system without direct writes, such as tmpfs
                raise
            self._file = os.open(path, flags, 0o666)
        self._direct = bool(fcntl.fcntl(self._file, fcntl.F_GETFL) & os.O_DIRECT)

    def __enter__(self) -> DirectFile:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        os.close(self._file)

    def write(self, data: memoryview) -> None:
        """Append bytes from an aligned buffer. After a length that is no multiple of BLOCK all writes go through the
        page cache, so that only a file's last one should have such a length."""
        whole = len(data) - len(data) % BLOCK
        for part in (data[:whole], data[whole:]):
            rest = part
            while rest:
                if self._direct and len(rest) % BLOCK:
                    self._direct = False
                    flags = fcntl.fcntl(self._file, fcntl.F_GETFL)
                    fcntl.fcntl(self._file, fcntl.F_SETFL, flags & ~os.O_DIRECT)
                rest = rest[os.write(self._file, rest) :]

    def sync(self) -> None:
        """Return when the disk has everything."""
        os.fsync(self._file)
