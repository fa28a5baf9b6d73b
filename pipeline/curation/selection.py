"""From scores to kept rows, and what a selection looks like: how it goes with length and loss, how far junk sinks."""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

from pipeline.report.intervals import Z_95

Floats = NDArray[np.float64]
Flags = NDArray[np.bool_]


def ranks(scores: Floats) -> NDArray[np.int64]:
    """1 for the highest score [N]; of equal ones the earlier row ranks higher."""
    found = np.empty(len(scores), dtype=np.int64)
    found[np.argsort(-scores, kind="stable")] = np.arange(1, len(scores) + 1)
    return found


def kept_rows(scores: Floats, keep_ratio: float) -> Flags:
    """The floor(rho N) rows of the highest scores [N]. Errors: ValueError if that is none."""
    count = math.floor(round(keep_ratio * len(scores), 6))
    if count == 0:
        raise ValueError(f"--keep_ratio {keep_ratio}: keeps none of {len(scores)} rows of --train_data: raise it")
    return np.asarray(ranks(scores) <= count)


def midranks(values: Floats) -> Floats:
    """Ranks from 1 for the lowest [N]; equal values share the mean of theirs."""
    _, inverse, counts = np.unique(values, return_inverse=True, return_counts=True)
    return np.asarray((np.cumsum(counts) - (counts - 1) / 2)[inverse])


def spearman(a: Floats, b: Floats) -> float | None:
    """Rank correlation; None where one of them is constant."""
    x, y = midranks(a) - (len(a) + 1) / 2, midranks(b) - (len(b) + 1) / 2
    scale = math.sqrt(float((x * x).sum() * (y * y).sum()))
    return float((x * y).sum()) / scale if scale else None


def auc(scores: Floats, planted: Flags) -> float:
    """The share of pairs in which an ordinary row scores above a planted one [N]; equal scores count half. 1: all the
    planted rows are at the bottom."""
    ordinary, junk = int((~planted).sum()), int(planted.sum())
    return float(midranks(scores)[~planted].sum() - ordinary * (ordinary + 1) / 2) / (ordinary * junk)


def auc_interval(value: float, ordinary: int, planted: int) -> tuple[float, float]:
    """95 % score interval of an AUC. It keeps its width at 0 and 1.

    Source: R. G. Newcombe (2006), Statistics in Medicine 25:559-573, method 5.
    """
    n = (ordinary + planted) / 2 - 1

    def beyond(a: float) -> bool:
        spread = a * (1 - a) / (ordinary * planted) * (1 + n * ((1 - a) / (2 - a) + a / (1 + a)))
        return (a - value) ** 2 > Z_95**2 * spread

    def end(inside: float, outside: float) -> float:
        for _ in range(60):
            middle = (inside + outside) / 2
            inside, outside = (inside, middle) if beyond(middle) else (middle, outside)
        return inside

    return (end(value, 0.0) if value > 0 else 0.0), (end(value, 1.0) if value < 1 else 1.0)


def auc_difference(first: Floats, second: Floats, planted: Flags) -> tuple[float, float, float]:
    """AUC of the first scores less that of the second on the same rows, with its 95 % interval.

    Source: E. R. DeLong et al. (1988), Biometrics 44:837-845.
    """
    parts = [_placements(each, planted) for each in (first, second)]
    value = float(parts[0][0].mean() - parts[1][0].mean())
    variance = sum(float(np.var(a - b, ddof=1)) / len(a) for a, b in zip(*parts, strict=True))
    half = Z_95 * math.sqrt(variance)
    return value, value - half, value + half


def _placements(scores: Floats, planted: Flags) -> tuple[Floats, Floats]:
    """For each ordinary row the share of planted ones below it, for each planted one the share of ordinary ones
    above."""
    order = midranks(scores)
    junk, ordinary = scores[planted], scores[~planted]
    below = (order[~planted] - midranks(ordinary)) / len(junk)
    above = 1 - (order[planted] - midranks(junk)) / len(ordinary)
    return below, above
