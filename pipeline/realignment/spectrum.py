"""How many directions of a spectrum are safety-critical: safety singular value entropy (LSSF, Eq. 5-7).

With p_i = sigma_i^2 / sum_j sigma_j^2 over the whole spectrum, H_rho = - sum_{i <= rho} p_i log p_i, and the rank is
the smallest rho with H_rho / H_n > eta. Where only the first q values are known, the tail's entropy lies between two
bounds, and the rank is known as soon as both give the same one.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Spectrum:
    """The first singular values of a matrix.

    Attributes:
        sigma: fp64 [q], largest first, q <= n.
        energy: sum of the squares of all n.
        n: number of singular values, which is the smaller side of the matrix.
    """

    sigma: torch.Tensor
    energy: float
    n: int

    @property
    def shares(self) -> torch.Tensor:
        """p_1 ... p_q."""
        return self.sigma.double().square() / self.energy

    @property
    def bounds(self) -> tuple[float, float]:
        """Between which the entropy H_n lies: all of the tail as large as p_q allows; all of it equal."""
        known = float(_entropies(self.shares).sum())
        tail, more = max(1 - float(self.shares.sum()), 0.0), self.n - len(self.sigma)
        if not more or not tail:
            return known, known
        largest = min(float(self.shares[-1]), tail)
        lower = known - tail * math.log(largest) if largest > 0 else known
        return lower, known + tail * math.log(more / tail)

    def rank(self, eta: float) -> int | None:
        """The safety-critical rank, 1 to n; None while the known values do not decide it. `eta` 1 gives n."""
        if eta >= 1:
            return self.n if len(self.sigma) == self.n else None
        lower, upper = (self._reached(eta * bound) for bound in self.bounds)
        return lower if lower == upper else None

    def _reached(self, wanted: float) -> int | None:
        """The smallest rho with H_rho > wanted."""
        above = (_entropies(self.shares).cumsum(0) > wanted).nonzero()
        if len(above):
            return int(above[0, 0]) + 1
        if len(self.sigma) < self.n:
            return None
        return 1 if wanted == 0 else self.n  # one direction has all the energy, and so no entropy

    def energy_kept(self, rank: int) -> float:
        """Share of the energy in the first `rank` directions."""
        return float(self.shares[:rank].sum())


def direction_weights(sigma: torch.Tensor, alpha_1: float) -> torch.Tensor:
    """alpha_i of the r directions of a subspace (Eq. 8-11), fp64 [r]: alpha_1 for the first, falling to 1 with sigma.

    Where sigma_1 = sigma_r, r = 1 included, the formula is 0/0: all are 1, so that nothing is amplified by chance.
    """
    first, last = sigma[0].double(), sigma[-1].double()
    if first == last:
        return torch.ones(len(sigma), dtype=torch.float64)
    return 1 + (alpha_1 - 1) * (sigma.double() - last) / (first - last)


def _entropies(shares: torch.Tensor) -> torch.Tensor:
    found: torch.Tensor = torch.special.entr(shares)
    return found
