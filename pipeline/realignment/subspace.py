"""The safety subspace of one linear map from its outputs Z on the anchors: standardisation, then a randomised SVD that
grows until the rank is known, or the exact one where that is cheaper.

Z is fp32 [tokens, rows], as it is recorded: the paper's Z transposed, so its left singular vectors are our right ones.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from pipeline.realignment.arguments import Norm
from pipeline.realignment.spectrum import Spectrum

FIRST, OVERSAMPLE, POWER = 256, 16, 4  # singular values tried first; more directions than those; power iterations
EXACT_FROM = 4  # the exact decomposition is taken once more than n / EXACT_FROM values are asked for
_DEAD = 1e-6  # of the median standard deviation: a neuron that does not move
_NOISE = 1e-10  # share of the largest squared singular value below which fp32 outputs hold rounding alone
_BLOCK = 2**22  # elements of Z that are worked on in fp64 at once


@dataclass(frozen=True)
class Subspace:
    """What the first directions of a map's outputs are.

    Attributes:
        spectrum: of the standardised outputs.
        vectors: U_r^T, fp32 [r, rows], rows orthonormal.
        tokens: from which it was computed.
        dead: neurons left out because they do not move over the anchors.
    """

    spectrum: Spectrum
    vectors: torch.Tensor
    tokens: int
    dead: int


def standardise(z: torch.Tensor, norm: Norm) -> int:
    """Centres and scales Z [tokens, rows] in place, with fp64 sums: each neuron over the tokens (LSSF), or each token
    over the neurons. Returns how many neurons, or tokens, do not move; they become zero."""
    if norm == "none":
        return 0
    view = z if norm == "neuron" else z.T
    count = view.shape[0]
    mean = torch.zeros(view.shape[1], dtype=torch.float64)
    for part in _split(view):
        mean += part.sum(0)
    mean /= count
    square = torch.zeros_like(mean)
    for part in _split(view):
        square += (part - mean).square().sum(0)
    deviation = (square / count).sqrt()
    dead = deviation <= _DEAD * deviation.median()
    scale = torch.where(dead, 0.0, 1 / deviation.where(~dead, torch.ones_like(deviation)))
    for part, target in zip(_split(view), _pieces(view), strict=True):
        target.copy_((part - mean) * scale)
    return int(dead.sum())


def find_subspace(z: torch.Tensor, *, eta: float, seed: int, dead: int = 0, first: int = FIRST) -> Subspace | None:
    """The directions of standardised outputs Z [tokens, rows] up to the rank of `eta`; None if Z is zero.

    seed: of the random start. first: singular values tried first.
    """
    energy = sum(float(part.square().sum()) for part in _split(z))
    if not energy:
        return None
    n, known, q = min(z.shape), None, first
    generator = torch.Generator().manual_seed(seed)
    while q + OVERSAMPLE <= n // EXACT_FROM and eta < 1:
        known = _range(z, q + OVERSAMPLE, known, generator)
        image = z @ known.T  # [tokens, q + OVERSAMPLE]
        values, rotation = _eigen(_gram(image))
        spectrum = Spectrum(values[:q].sqrt(), energy, n)
        rank = spectrum.rank(eta)
        if rank is not None:
            kept = rotation[:, len(values) - rank :].flip(1)
            return Subspace(spectrum, (kept.T @ known.double()).float(), len(z), dead)
        q *= 2
    return _exact(z, eta, energy, dead)


def _exact(z: torch.Tensor, eta: float, energy: float, dead: int) -> Subspace:
    """From the Gram matrix of the smaller side, in fp64."""
    tokens, rows = z.shape
    wide = rows > tokens
    values, vectors = _eigen(_gram(z.T if wide else z))
    values = torch.where(values > _NOISE * values[0], values, 0.0)
    spectrum = Spectrum(values.sqrt(), energy, len(values))
    rank = spectrum.rank(eta)
    assert rank is not None, "the whole spectrum decides every rank"
    kept = vectors[:, len(values) - rank :].flip(1)
    if not wide:
        return Subspace(spectrum, kept.T.float().contiguous(), tokens, dead)
    # u_i = Z v_i / sigma_i; a direction that is noise has no u_i and stays zero.
    inverse = torch.where(values[:rank] > 0, values[:rank].rsqrt(), 0.0)
    kept *= inverse
    found = torch.empty(rank, rows)
    for part, columns in zip(_pieces(z.T), found.split(_rows(z.T), dim=1), strict=True):
        columns.copy_((part.double() @ kept).T)
    return Subspace(spectrum, found, tokens, dead)


def _range(z: torch.Tensor, count: int, known: torch.Tensor | None, generator: torch.Generator) -> torch.Tensor:
    """`count` orthonormal directions [count, rows] near the first right singular vectors of Z (Halko et al. 2011);
    those that are known already are the start."""
    have = 0 if known is None else len(known)
    fresh = torch.randn(count - have, z.shape[1], generator=generator)
    start = fresh if known is None else torch.cat([known, fresh])
    for _ in range(POWER):
        start = torch.linalg.qr((z.T @ (z @ start.T)).double())[0].T.float()
    return start


def _gram(matrix: torch.Tensor) -> torch.Tensor:
    """M^T M in fp64."""
    found = torch.zeros(matrix.shape[1], matrix.shape[1], dtype=torch.float64)
    for part in _split(matrix):
        found.addmm_(part.T, part)
    return found


def _eigen(gram: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Eigenvalues, largest first and not below zero; eigenvectors as columns, the largest one's last."""
    values, vectors = torch.linalg.eigh(gram)
    return values.flip(0).clamp(min=0), vectors


def _pieces(matrix: torch.Tensor) -> tuple[torch.Tensor, ...]:
    pieces: tuple[torch.Tensor, ...] = matrix.split(_rows(matrix))
    return pieces


def _rows(matrix: torch.Tensor) -> int:
    return max(_BLOCK // matrix.shape[1], 1)


def _split(matrix: torch.Tensor) -> Iterator[torch.Tensor]:
    """Blocks of rows, in fp64."""
    return (part.double() for part in _pieces(matrix))
