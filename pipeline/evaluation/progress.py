"""Progress of a long phase: a bar on a terminal, a line now and then in a log file."""

from __future__ import annotations

import sys
import time

from tqdm import tqdm

LINE_EVERY = 10.0  # seconds


class Progress:
    """Counts `total` items, of which `done` were there before; shows tokens, or else items, a second."""

    def __init__(self, label: str, *, total: int, done: int = 0) -> None:
        self._label, self._total, self._done, self._tokens = label, total, done, 0
        self._start = self._shown = time.monotonic()
        self._first = done
        self._bar = tqdm(total=total, initial=done, desc=label) if sys.stderr.isatty() else None

    def update(self, items: int, tokens: int) -> None:
        """`items` more are done, which took `tokens` tokens."""
        self._done += items
        self._tokens += tokens
        now = time.monotonic()
        seconds = max(now - self._start, 1e-9)
        rate = f"{self._tokens / seconds:.0f} tokens/s"
        if not self._tokens:  # verdicts
            rate = f"{(self._done - self._first) / seconds:.1f} a second"
        if self._bar is not None:
            self._bar.update(items)
            self._bar.set_postfix_str(rate)
        elif now - self._shown >= LINE_EVERY or self._done == self._total:
            left = seconds / (self._done - self._first) * (self._total - self._done)
            print(f"{self._label}: {self._done}/{self._total}, {rate}, {left:.0f} s left", flush=True)
            self._shown = now
        if self._bar is not None and self._done == self._total:
            self._bar.close()
