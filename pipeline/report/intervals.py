"""Confidence intervals of a share."""

from __future__ import annotations

import math

Z_95 = 1.959963984540054  # the standard normal's 97.5 % quantile


def wilson(k: int, n: int) -> tuple[float, float]:
    """95 % Wilson score interval of k successes in n trials, as fractions.

    Unlike k/n +- 1.96 standard errors it stays inside [0, 1] and keeps its width at k = 0 and k = n, where most of our
    shares are. Source: E. B. Wilson (1927), J. Am. Stat. Assoc. 22:209-212.
    Errors: ValueError unless 0 <= k <= n and n > 0.
    """
    if not 0 <= k <= n or n == 0:
        raise ValueError(f"Wilson interval: k={k} successes in n={n} trials is not a share")
    share = k / n
    spread = Z_95 / n * math.sqrt(k * (n - k) / n + Z_95**2 / 4)
    scale = 1 + Z_95**2 / n
    centre = (share + Z_95**2 / (2 * n)) / scale
    # At k = 0 and k = n one end is exactly the share; rounding would leave it beside.
    low = 0.0 if k == 0 else centre - spread / scale
    high = 1.0 if k == n else centre + spread / scale
    return low, high
