"""Interleaved timing, and what is said about it: quartiles of paired ratios, and fits over lengths."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple, TypeVar

import numpy as np
import torch

T = TypeVar("T")


class Seconds(NamedTuple):
    """One training step: its forward and backward passes, and all of it with the optimizer."""

    passes: float
    step: float


class Quartiles(NamedTuple):
    """Median and interquartile range."""

    median: float
    low: float
    high: float


def clock(device: torch.device) -> float:
    """Seconds now, after everything queued on the device is done."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def interleave(ways: Mapping[str, Callable[[], T]], repeats: int, *, warmup: int = 1) -> dict[str, list[T]]:
    """Run every way `repeats` times, in turn and every other time in the opposite order (A B B A ...), so that what
    drifts on the machine meets all of them alike. The first `warmup` rounds are thrown away."""
    found: dict[str, list[T]] = {name: [] for name in ways}
    for turn in range(-warmup, repeats):
        for name in list(ways)[:: 1 if turn % 2 == 0 else -1]:
            value = ways[name]()
            if turn >= 0:
                found[name].append(value)
    return found


def quartiles(values: Sequence[float]) -> Quartiles:
    """Of at least one value."""
    low, median, high = np.quantile(values, [0.25, 0.5, 0.75]).tolist()
    return Quartiles(median, low, high)


def ratio(above: Sequence[float], below: Sequence[float]) -> Quartiles:
    """Of the quotients, pair by pair."""
    return quartiles([a / b for a, b in zip(above, below, strict=True)])


class Fit(NamedTuple):
    """Least squares over lengths: coefficients from the highest power down, and the share of variance explained."""

    coefficients: list[float]
    r_squared: float


def fit(lengths: Sequence[int], values: Sequence[float], degree: int) -> Fit:
    """A polynomial through values over lengths. Needs more lengths than coefficients."""
    x, y = np.array(lengths, dtype=float), np.array(values, dtype=float)
    coefficients = np.polyfit(x, y, degree)
    missed = float(((y - np.polyval(coefficients, x)) ** 2).sum())
    spread = float(((y - y.mean()) ** 2).sum())
    return Fit(coefficients.tolist(), 1.0 if missed == 0 else 1 - missed / spread if spread else 0.0)
