"""What is added to each tensor of the tuned model.

LSSF (Eq. 11-13): theta' = theta_tuned + alpha P' delta with P' = U' U'^T and U' = [alpha_i u_i], so direction i counts
alpha_i squared. P' delta is never formed: it is left @ right with left = alpha U' and right = U'^T delta; where delta
is an adapter's - s B A, with left = - alpha s U' (U'^T B) and right = A, so that its rank stays the adapter's.
RESTA (arXiv 2402.11746, without its DARE step): theta' = theta_tuned + alpha delta.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Protocol

import torch

from pipeline.realignment.bases import Bases
from pipeline.realignment.maps import LinearMap, by_tensor
from pipeline.realignment.spectrum import direction_weights
from pipeline.realignment.vector import SafetyVector, product_norm, rows_of


@dataclass(frozen=True)
class Change:
    """The update of one tensor.

    Attributes:
        blocks: of rows, fp32.
        delta_norm: Frobenius norm of the safety vector there; None: that of the update over alpha.
    """

    blocks: Iterator[torch.Tensor]
    delta_norm: float | None


class Updates(Protocol):
    """names: the tensors that are changed."""

    names: set[str]

    def change(self, name: str, shape: tuple[int, ...]) -> Change: ...


class Resta:
    """All of the safety vector, in every tensor."""

    def __init__(self, vector: SafetyVector, alpha: float) -> None:
        self._vector, self._alpha = vector, alpha
        self.names = vector.names if alpha else set()

    def change(self, name: str, shape: tuple[int, ...]) -> Change:
        return Change((self._alpha * each for each in self._vector.blocks(name, rows_of(shape))), None)


class Lssf:
    """The safety vector within each map's subspace.

    Attributes:
        maps: that are changed, by tensor; none if `alpha` is 0.
        still: maps whose outputs do not move over the anchors: they have no subspace.
    """

    def __init__(
        self,
        vector: SafetyVector,
        maps: Mapping[str, list[LinearMap]],
        bases: Bases,
        *,
        eta: float,
        alpha: float,
        alpha_1: float,
    ) -> None:
        self._vector, self._bases = vector, bases
        self._eta, self._alpha, self._alpha_1 = eta, alpha, alpha_1
        every = [each for parts in maps.values() for each in parts] if alpha else []
        self.still = [each for each in every if bases.spectrum(each) is None]
        self.maps = by_tensor([each for each in every if each not in self.still])
        self.names = set(self.maps)

    def rank(self, each: LinearMap) -> int:
        """Of a map's subspace."""
        spectrum = self._bases.spectrum(each)
        rank = spectrum.rank(self._eta) if spectrum else None
        assert rank is not None, "stage A decides every rank"
        return rank

    def change(self, name: str, shape: tuple[int, ...]) -> Change:
        left, right, delta_norm = self.factors(name, shape)
        return Change((part @ right for part in left.split(rows_of(shape))), delta_norm)

    def width(self, name: str) -> int:
        """r of the update's low-rank form."""
        found = self._vector.width(name)
        return sum(map(self.rank, self.maps[name])) if found is None else found

    def factors(self, name: str, shape: tuple[int, ...]) -> tuple[torch.Tensor, torch.Tensor, float]:
        """fp32 left [rows, r] and right [r, columns] of the update, and the norm of delta."""
        parts = [(each, self._directions(each)) for each in self.maps[name]]
        found = self._vector.factors(name)
        if found is None:
            return self._dense(name, shape, parts)
        delta_left, right = found
        left = torch.zeros_like(delta_left)
        for each, weighted in parts:
            rows = slice(each.start, each.stop)
            left[rows] = self._alpha * (weighted.T @ (weighted @ delta_left[rows]))
        return left, right, product_norm(delta_left, right)

    def _dense(
        self, name: str, shape: tuple[int, ...], parts: list[tuple[LinearMap, torch.Tensor]]
    ) -> tuple[torch.Tensor, torch.Tensor, float]:
        rows, columns = shape
        # U'^T of all parts: block by block on the diagonal, so that the parts of a fused map do not mix.
        whole = torch.zeros(sum(len(weighted) for _, weighted in parts), rows)
        place = 0
        for each, weighted in parts:
            whole[place : place + len(weighted), each.start : each.stop] = weighted
            place += len(weighted)
        parts.clear()
        right = torch.zeros(len(whole), columns)
        square, row = 0.0, 0
        for block in self._vector.blocks(name, rows_of(shape)):
            square += float(torch.linalg.vector_norm(block, dtype=torch.float64)) ** 2
            right.addmm_(whole[:, row : row + len(block)], block)
            row += len(block)
        return whole.mul_(self._alpha).T, right, square**0.5

    def _directions(self, each: LinearMap) -> torch.Tensor:
        """U'^T, fp32 [rank, rows]."""
        rank = self.rank(each)
        spectrum = self._bases.spectrum(each)
        assert spectrum is not None
        weights = direction_weights(spectrum.sigma[:rank], self._alpha_1)
        return self._bases.directions(each, rank).mul_(weights.float()[:, None])
