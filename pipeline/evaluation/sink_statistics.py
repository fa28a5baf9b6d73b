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
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipeline.report.significance import LEVEL, holm, sign_test


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
