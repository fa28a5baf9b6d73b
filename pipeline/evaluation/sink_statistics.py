"""From the sink attention of single texts to the statistics of every head.

With a_h(x) the mean sink attention of text x in head h, over n harmful texts x_1..x_n and m harmless texts y_1..y_m:

    d_h = mean_i a_h(x_i) - mean_j a_h(y_j)          each text weighs the same
    SE_h = sqrt(s2_h(x) / n + s2_h(y) / m)           of the difference of two independent means (Welch), s2 unbiased

Sign test of head h: x_i is paired with y_i in the order of the pools, over the first min(n, m) of each, and pairs with
equal values are dropped. If texts of both kinds are alike to the head, a_h(x_i) > a_h(y_i) in half of the pairs; the
two-sided p-value is the exact binomial one. It assumes nothing about how the values are distributed.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

LEVEL = 0.05
"""Chance that any head is called significant though none differs (family-wise error after Holm's correction)."""


@dataclass(frozen=True)
class HeadStatistics:
    """Arrays are [L,H], layers x heads.

    harmful_mean, harmless_mean, divergence, standard_error: fp64, shares of a query's attention (0..1).
    pairs: text pairs compared; positive_pairs: int64, those of them in which the harmful text has the larger value.
    p_value: fp64, of the sign test; p_holm: the same after Holm's correction over all L x H heads.
    significant: int64; 1 where p_holm < LEVEL and both the pairs' majority and the divergence are positive, -1 where
        both are negative, else 0.
    """

    harmful_mean: NDArray[np.float64]
    harmless_mean: NDArray[np.float64]
    divergence: NDArray[np.float64]
    standard_error: NDArray[np.float64]
    pairs: int
    positive_pairs: NDArray[np.int64]
    p_value: NDArray[np.float64]
    p_holm: NDArray[np.float64]
    significant: NDArray[np.int64]

    def record(self) -> dict[str, Any]:
        """The fields as sinks.json holds them, behind their summary: the share of heads with d > 0, R, and how many
        heads are significantly positive and negative."""
        arrays = {name: value.tolist() for name, value in vars(self).items() if isinstance(value, np.ndarray)}
        return {
            "positive_heads": float((self.divergence > 0).mean()),
            "penalty": float(self.divergence.clip(min=0).mean()),
            "significant_positive_heads": int((self.significant > 0).sum()),
            "significant_negative_heads": int((self.significant < 0).sum()),
            "significance": f"two-sided sign test, Holm's correction over all heads, level {LEVEL}",
            "pairs": self.pairs,
            **arrays,
        }


def head_statistics(harmful: NDArray[np.float32], harmless: NDArray[np.float32]) -> HeadStatistics:
    """harmful [n,L,H] and harmless [m,L,H]: a_h of every text, n and m at least 2. Computed in fp64."""
    x, y = harmful.astype(np.float64), harmless.astype(np.float64)
    pairs = min(len(x), len(y))
    divergence = x.mean(0) - y.mean(0)
    positive, negative = (x[:pairs] > y[:pairs]).sum(0), (x[:pairs] < y[:pairs]).sum(0)
    p_value = sign_test(positive, negative)
    p_holm = holm(p_value)
    majority = np.sign(positive - negative)
    agree = (p_holm < LEVEL) & (majority == np.sign(divergence))
    return HeadStatistics(
        harmful_mean=x.mean(0),
        harmless_mean=y.mean(0),
        divergence=divergence,
        standard_error=np.sqrt(x.var(0, ddof=1) / len(x) + y.var(0, ddof=1) / len(y)),
        pairs=pairs,
        positive_pairs=positive,
        p_value=p_value,
        p_holm=p_holm,
        significant=np.where(agree, majority, 0),
    )


def sign_test(positive: NDArray[np.int64], negative: NDArray[np.int64]) -> NDArray[np.float64]:
    """Exact two-sided p-values for counts of positive and negative differences, of any one shape.

    p = min(1, 2 P(K <= k)), K ~ Binomial(n, 1/2), with k the smaller count and n their sum; 1 where n is 0.
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
    however the entries depend on each other, as heads do that see the same texts. Source: S. Holm (1979), Scand. J.
    Stat. 6:65-70."""
    order = np.argsort(p, axis=None)
    adjusted = np.minimum(1.0, p.flat[order] * np.arange(p.size, 0, -1))
    found = np.empty(p.size)
    found[order] = np.maximum.accumulate(adjusted)
    return found.reshape(p.shape)
