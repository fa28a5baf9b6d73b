"""The rank of a safety subspace and its directions, against a plain SVD in fp64."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
import torch

from pipeline.realignment.spectrum import Spectrum, direction_weights
from pipeline.realignment.subspace import find_subspace, standardise

ETAS = [0.3, 0.5, 0.7, 0.8, 0.85, 0.9, 0.99]


def outputs(tokens: int, rows: int, *, decay: float, seed: int = 0) -> torch.Tensor:
    """Random outputs [tokens, rows], standardised, whose singular values fall like i^-decay before that."""
    generator = torch.Generator().manual_seed(seed)
    n = min(tokens, rows)
    left = torch.linalg.qr(torch.randn(tokens, n, generator=generator, dtype=torch.float64))[0]
    right = torch.linalg.qr(torch.randn(rows, n, generator=generator, dtype=torch.float64))[0]
    z = ((left * torch.arange(1, n + 1, dtype=torch.float64) ** -decay) @ right.T).float()
    standardise(z, "neuron")
    return z


def exact(z: torch.Tensor) -> Spectrum:
    sigma = torch.linalg.svdvals(z.double())
    return Spectrum(sigma, float(sigma.square().sum()), len(sigma))


def plain_rank(sigma: torch.Tensor, eta: float) -> int:
    """The definition, term by term."""
    shares = [float(each) for each in sigma.double().square() / sigma.double().square().sum()]
    terms = [-p * math.log(p) if p > 0 else 0.0 for p in shares]
    reached = 0.0
    for rho, term in enumerate(terms, start=1):
        reached += term
        if reached / sum(terms) > eta:
            return rho
    return len(terms)


@pytest.mark.parametrize("eta", ETAS)
def test_rank_is_the_smallest_that_holds_more_than_eta_of_the_entropy(eta: float) -> None:
    spectrum = exact(outputs(90, 40, decay=1.0))
    assert spectrum.rank(eta) == plain_rank(spectrum.sigma, eta)


def test_rank_never_falls_as_eta_rises_and_eta_1_takes_all() -> None:
    spectrum = exact(outputs(90, 40, decay=1.0))
    ranks = [spectrum.rank(eta) or 0 for eta in [*ETAS, 1.0]]
    assert all(before <= after for before, after in pairwise(ranks))
    assert ranks[0] < ranks[-1] == spectrum.n == 40


@pytest.mark.parametrize("q", [8, 16, 32, 64])
def test_what_the_bounds_decide_is_what_the_whole_spectrum_says(q: int) -> None:
    whole = exact(outputs(300, 200, decay=1.5))
    entropy = float(torch.special.entr(whole.shares).sum())
    known = Spectrum(whole.sigma[:q], whole.energy, whole.n)
    lower, upper = known.bounds
    assert lower <= entropy <= upper
    decided = [eta for eta in ETAS if known.rank(eta) is not None]
    assert all(known.rank(eta) == whole.rank(eta) for eta in decided)
    assert known.rank(1.0) is None  # the directions are not all there
    if q == 64:
        assert 0.5 in decided


def test_one_direction_has_no_entropy_and_rank_1() -> None:
    assert Spectrum(torch.tensor([3.0, 0.0, 0.0]).double(), 9.0, 3).rank(0.85) == 1


@pytest.mark.parametrize(("tokens", "rows"), [(700, 400), (400, 700)])
@pytest.mark.parametrize("eta", [0.5, 0.7, 0.8])
def test_randomised_and_exact_give_one_rank_and_one_subspace(tokens: int, rows: int, eta: float) -> None:
    z = outputs(tokens, rows, decay=1.5)
    found = find_subspace(z, eta=eta, seed=1, first=16)
    straight = find_subspace(z, eta=eta, seed=1, first=10**6)
    assert found is not None
    assert straight is not None
    assert len(found.spectrum.sigma) < len(straight.spectrum.sigma) == found.spectrum.n == 400  # it was randomised
    rank = plain_rank(torch.linalg.svdvals(z.double()), eta)
    assert len(found.vectors) == len(straight.vectors) == rank
    overlap = torch.linalg.svdvals(found.vectors.double() @ straight.vectors.double().T)
    assert overlap.min() > 1 - 1e-4  # cosine of the largest angle between the two


@pytest.mark.parametrize(("tokens", "rows"), [(200, 60), (60, 200)])
def test_directions_are_those_of_the_svd(tokens: int, rows: int) -> None:
    z = outputs(tokens, rows, decay=0.5)
    found = find_subspace(z, eta=0.9, seed=0)
    assert found is not None
    _, sigma, right = torch.linalg.svd(z.double(), full_matrices=False)
    rank = len(found.vectors)
    assert torch.allclose(found.spectrum.sigma[:rank], sigma[:rank], rtol=1e-6)
    assert torch.allclose(found.vectors @ found.vectors.T, torch.eye(rank), atol=1e-5)
    theirs = right[:rank].T @ right[:rank]
    assert torch.allclose(found.vectors.T.double() @ found.vectors.double(), theirs, atol=1e-5)


def test_standardise_leaves_neurons_with_mean_0_and_deviation_1_but_those_that_do_not_move() -> None:
    generator = torch.Generator().manual_seed(0)
    z = torch.randn(5000, 7, generator=generator) * torch.tensor([1, 10, 0.01, 3, 5, 7, 0]) + 40
    assert standardise(z, "neuron") == 1
    assert torch.allclose(z.mean(0), torch.zeros(7), atol=1e-4)
    assert torch.allclose(z.std(0, unbiased=False), torch.tensor([1.0, 1, 1, 1, 1, 1, 0]), atol=1e-3)
    assert not z[:, 6].any()


def test_standardise_by_token_and_not_at_all() -> None:
    z = torch.randn(20, 300, generator=torch.Generator().manual_seed(0)) + 3
    before = z.clone()
    standardise(z, "none")
    assert torch.equal(z, before)
    standardise(z, "token")
    assert torch.allclose(z.std(1, unbiased=False), torch.ones(20), atol=1e-5)


def test_outputs_that_never_move_have_no_subspace() -> None:
    assert find_subspace(torch.zeros(10, 5), eta=0.85, seed=0) is None


def test_weights_fall_from_alpha_1_to_1() -> None:
    sigma = torch.tensor([5.0, 4.0, 1.0])
    assert direction_weights(sigma, 2.0).tolist() == [2.0, 1.75, 1.0]
    assert direction_weights(sigma, 1.0).tolist() == [1.0, 1.0, 1.0]


@pytest.mark.parametrize("sigma", [[4.0], [4.0, 4.0, 4.0]])
def test_weights_without_a_slope_amplify_nothing(sigma: list[float]) -> None:
    assert direction_weights(torch.tensor(sigma), 3.0).tolist() == [1.0] * len(sigma)


def test_eigenvalues_of_the_weighted_projector_are_the_squared_weights() -> None:
    found = find_subspace(outputs(200, 60, decay=1.0), eta=0.8, seed=0)
    assert found is not None
    rank = len(found.vectors)
    weights = direction_weights(found.spectrum.sigma[:rank], 2.5)
    weighted = found.vectors.double() * weights[:, None]
    eigenvalues = torch.linalg.eigvalsh(weighted.T @ weighted).flip(0)
    assert torch.allclose(eigenvalues[:rank], weights.square(), rtol=1e-5)
    assert torch.allclose(eigenvalues[rank:], torch.zeros(60 - rank, dtype=torch.float64), atol=1e-6)
