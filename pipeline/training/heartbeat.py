"""What this rank is doing, told by the training loop as it goes, for the watchdog to read from its own thread."""

from __future__ import annotations

import threading
import time
from collections import deque
from dataclasses import dataclass
from typing import Any

# One letter for each call that all ranks make in the same order.
FORWARD, BACKWARD, OPTIMIZER, EVALUATION, CHECKPOINT = "f", "b", "o", "e", "c"
NAMES = {
    FORWARD: "a forward pass", BACKWARD: "a backward pass", OPTIMIZER: "an optimizer step",
    EVALUATION: "an evaluation", CHECKPOINT: "a checkpoint",
}  # fmt: skip
WINDOW = 512  # calls that are told to the others; ranks are never further apart than one optimizer step


@dataclass(frozen=True)
class Beat:
    """A rank at one moment.

    calls: how many it has begun since the start; recent: the last of them, one letter each; shape: of the last batch,
    which differs between ranks by right; idle: seconds since the last call or phase began; where: innermost frames of
    its main thread, outermost first.
    """

    rank: int
    node: str
    step: int
    phase: str
    calls: int
    recent: str
    forwards: int
    backwards: int
    shape: str
    idle: float
    time: float
    where: list[str]


class Heart:
    """This rank's calls and phase. The main thread writes, the watchdog's thread reads."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._recent: deque[str] = deque(maxlen=WINDOW)
        self._counts = dict.fromkeys(NAMES, 0)
        self._calls = self._step = 0
        self._phase, self._shape = "starting", ""
        self._since = time.monotonic()

    def phase(self, name: str, step: int) -> None:
        """A phase begins: loading, training, evaluating, saving ..."""
        with self._lock:
            self._phase, self._step, self._since = name, step, time.monotonic()

    def call(self, letter: str, shape: str = "") -> None:
        """A call begins that every rank makes."""
        with self._lock:
            self._recent.append(letter)
            self._counts[letter] += 1
            self._calls += 1
            self._shape = shape or self._shape
            self._since = time.monotonic()

    def watch(self, engine: Any) -> None:
        """Count a DeepSpeed engine's forward and backward passes, whoever makes them."""

        def forward(module: Any, words: Any, named: dict[str, Any]) -> None:
            tokens = named.get("input_ids")
            self.call(FORWARD, "x".join(map(str, tokens.shape)) if tokens is not None else "")

        engine.module.register_forward_pre_hook(forward, with_kwargs=True)
        backward = engine.backward

        def counted(*words: Any, **named: Any) -> Any:
            self.call(BACKWARD)
            return backward(*words, **named)

        engine.backward = counted

    def beat(self, rank: int, node: str, where: list[str]) -> Beat:
        """How things stand now."""
        with self._lock:
            return Beat(
                rank=rank, node=node, step=self._step, phase=self._phase, calls=self._calls,
                recent="".join(self._recent), forwards=self._counts[FORWARD], backwards=self._counts[BACKWARD],
                shape=self._shape, idle=time.monotonic() - self._since, time=time.time(), where=where,
            )  # fmt: skip
