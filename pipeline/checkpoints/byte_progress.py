"""Progress of a long write: a bar on a terminal, a line now and then in a log file."""

from __future__ import annotations

import sys
import time
from types import TracebackType

from tqdm import tqdm

LINE_EVERY = 30.0  # seconds


class ByteProgress:
    """Counts `total` bytes, of which `done` were there before; a context manager, for one thread at a time."""

    def __init__(self, *, total: int, done: int) -> None:
        self._total, self._done, self._first = total, done, done
        self._start = self._shown = time.monotonic()
        terminal = sys.stderr.isatty()
        self._bar = tqdm(total=total, initial=done, unit="B", unit_scale=True) if terminal else None

    def __enter__(self) -> ByteProgress:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.close()

    def update(self, count: int) -> None:
        """`count` more bytes are done."""
        self._done += count
        now = time.monotonic()
        if self._bar is not None:
            self._bar.update(count)
        elif now - self._shown >= LINE_EVERY:
            speed = (self._done - self._first) / (now - self._start)
            left = (self._total - self._done) / speed
            print(
                f"{self._done / 1e9:.1f} of {self._total / 1e9:.1f} GB, {speed / 1e9:.2f} GB/s, {left:.0f} s left",
                file=sys.stderr,
                flush=True,
            )
            self._shown = now
