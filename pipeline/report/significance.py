"""Exact tests for what differs within pairs, and their correction where many are made."""

from __future__ import annotations

from functools import cache

import numpy as np
from numpy.typing import NDArray

LEVEL = 0.05
"""Chance that any of a family of comparisons is called significant though none differs (after Holm's correction)."""


def sign_test(positive: NDArray[np.int64], negative: NDArray[np.int64]) -> NDArray[np.float64]:
    """Exact two-sided p-values for counts of positive and negative differences, of any one shape.

    p = min(1, 2 P(K <= k)), K ~ Binomial(n, 1/2), with k the smaller count and n their sum; 1 where n is 0. On pairs
    of yes and no, counted where they differ, this is McNemar's test in its exact form.
    Source: Q. McNemar (1947), Psychometrika 12:153-157.
    """
    found = [
        _two_sided(int(plus + minus))[int(min(plus, minus))]
        for plus, minus in zip(positive.flat, negative.flat, strict=True)
    ]
    return np.array(found).reshape(positive.shape)


@cache
def _two_sided(n: int) -> list[float]:
    """p for k = 0..n//2. Whole numbers up to the last division: exact for any n, where floats would underflow."""
    ways, tail, found = 1, 0, []
    for k in range(n // 2 + 1):
        tail += ways
        found.append(min(1.0, 2 * tail / 2**n))
        ways = ways * (n - k) // (k + 1)
    return found


def holm(p: NDArray[np.float64]) -> NDArray[np.float64]:
    """Adjusted p-values over all entries of p: rejecting those below a level errs at all with at most that chance,
    however the entries depend on each other, as those do that see the same texts. Source: S. Holm (1979), Scand. J.
    Stat. 6:65-70."""
    order = np.argsort(p, axis=None)
    adjusted = np.minimum(1.0, p.flat[order] * np.arange(p.size, 0, -1))
    found = np.empty(p.size)
    found[order] = np.maximum.accumulate(adjusted)
    return found.reshape(p.shape)
