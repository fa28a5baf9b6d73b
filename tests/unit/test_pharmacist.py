"""The parts of Pharmacist that need no engine: the selector, the toxic increment, selections and what is said of
them."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from pipeline.curation.pharmacist_increment import ToxicIncrement, targets_of
from pipeline.curation.pharmacist_selector import Selector
from pipeline.curation.pharmacist_settings import PharmacistArguments, doubts
from pipeline.curation.selection import auc, auc_difference, auc_interval, kept_rows, ranks, spearman
from pipeline.data.chat import Example
from pipeline.data.packing import pack
from pipeline.training.passes import row_means
from tests.tiny import tiny_llama

ROWS = torch.tensor([3, 0, 3])  # one of them twice
OF_WEIGHTS = torch.tensor([0.5, 2.0, 0.25], dtype=torch.float64)


def selector(update: str) -> Selector:
    found = Selector(6, learning_rate=0.1, update=update)  # type: ignore[arg-type]
    found.logits += torch.linspace(-1, 1, 6, dtype=torch.float64)
    return found


def test_weights_sum_to_the_number_of_rows() -> None:
    one = selector("lazy")
    for step in range(20):
        one.step(ROWS, OF_WEIGHTS * (-1) ** step)
        assert one.weights().sum().item() == pytest.approx(6, abs=1e-12)
    assert one.weights().std() > 0.1


def test_the_gradient_of_the_logits_is_autograds() -> None:
    one, everyone = selector("dense"), torch.arange(6)
    logits = one.logits.clone().requires_grad_()
    ((6 * logits.softmax(0))[ROWS] * OF_WEIGHTS).sum().backward()
    torch.testing.assert_close(one.gradient(ROWS, OF_WEIGHTS, everyone), logits.grad, rtol=1e-12, atol=1e-14)


def test_a_lazy_gradient_holds_the_weight_of_the_batch() -> None:
    one, drawn = selector("lazy"), torch.tensor([0, 3, 4])
    logits, total = one.logits[drawn].requires_grad_(), one.weights()[drawn].sum()
    of_weights = torch.tensor([0.5, 2.0, 0.25], dtype=torch.float64)
    ((total * logits.softmax(0)) * of_weights).sum().backward()
    torch.testing.assert_close(one.gradient(drawn, of_weights, drawn), logits.grad, rtol=1e-12, atol=1e-14)
    one.step(drawn, 0 * of_weights + 7)  # equal losses move nothing
    torch.testing.assert_close(one.logits, selector("lazy").logits, rtol=0, atol=1e-3)


def test_dense_is_adam() -> None:
    one = selector("dense")
    logits = torch.nn.Parameter(one.logits.clone())
    adam = torch.optim.Adam([logits], lr=0.1, betas=(0.9, 0.95), eps=1e-12)
    for step in range(5):
        rows = torch.tensor([step % 6, (step + 2) % 6, 5])
        logits.grad = one.gradient(rows, OF_WEIGHTS, torch.arange(6))
        adam.step()
        one.step(rows, OF_WEIGHTS)
        torch.testing.assert_close(one.logits, logits.detach(), rtol=1e-9, atol=0)


def test_lazy_moves_the_rows_of_the_step_alone() -> None:
    one = selector("lazy")
    before = one.logits.clone()
    one.step(ROWS, OF_WEIGHTS)
    moved = (one.logits != before).tolist()
    assert moved == [True, False, False, True, False, False]
    # The first step of Adam is the learning rate, up where a weight lowers F by more than the batch's mean.
    torch.testing.assert_close((one.logits - before)[[0, 3]], torch.tensor([-0.1, 0.1], dtype=torch.float64))


def test_a_rows_loss_is_the_mean_over_its_own_tokens() -> None:
    texts = [Example("a", [1, 2, 3, 4], [-100, -100, 3, 4], False), Example("b", [5, 6, 7], [-100, 6, -100], False)]
    batch = pack(texts, [Example("reference", [8, 9], [-100, -100], False)])
    losses = torch.tensor([1.0, 3.0, 5.0], requires_grad=True)
    means = row_means(losses, batch)
    assert means.tolist() == [2.0, 5.0]
    means[0].backward()
    assert losses.grad.tolist() == [0.5, 0.5, 0.0]


def test_the_increment_is_in_the_model_only_while_it_is_on() -> None:
    model, ids = tiny_llama(), torch.arange(4, 16)[None]
    increment = ToxicIncrement(model, ["q_proj", "v_proj"], r=3, alpha=6, seed=0, device=torch.device("cpu"))
    for up in increment.up:
        up.normal_(std=0.1)
    names = set(model.state_dict())
    plain = model(input_ids=ids).logits
    with increment.on(0.5):
        on = model(input_ids=ids).logits
        assert set(model.state_dict()) == names  # nothing that a checkpoint would hold
    assert torch.equal(model(input_ids=ids).logits, plain)
    with torch.no_grad():
        for module, down, up in zip(
            targets_of(model, ["q_proj", "v_proj"]).values(), increment.down, increment.up, strict=True
        ):
            module.weight += 0.5 * 6 / 3 * up @ down
    torch.testing.assert_close(on, model(input_ids=ids).logits, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(on, plain, rtol=1e-2)


def test_the_increment_leaves_with_an_error() -> None:
    model, ids = tiny_llama(), torch.arange(4, 16)[None]
    increment = ToxicIncrement(model, ["q_proj"], r=3, alpha=6, seed=0, device=torch.device("cpu"))
    for up in increment.up:
        up.normal_(std=0.1)
    plain = model(input_ids=ids).logits
    with pytest.raises(KeyboardInterrupt), increment.on(1.0):
        raise KeyboardInterrupt
    assert torch.equal(model(input_ids=ids).logits, plain)


def test_the_best_rows_are_kept_and_the_earlier_of_equal_ones() -> None:
    scores = np.array([0.0, 2.0, 1.0, 1.0, -1.0])
    assert ranks(scores).tolist() == [4, 1, 2, 3, 5]
    assert kept_rows(scores, 0.4).tolist() == [False, True, True, False, False]
    assert kept_rows(np.zeros(5), 0.6).tolist() == [True, True, True, False, False]  # not 2 for 0.6 x 5 = 2.999...
    with pytest.raises(ValueError, match="--keep_ratio 0.1: keeps none of 5 rows of --train_data: raise it"):
        kept_rows(scores, 0.1)


def test_auc_counts_pairs() -> None:
    generator = np.random.default_rng(0)
    scores, planted = generator.integers(0, 5, 40).astype(float), generator.random(40) < 0.3
    pairs = [(a > b) + 0.5 * (a == b) for a in scores[~planted] for b in scores[planted]]
    assert auc(scores, planted) == pytest.approx(np.mean(pairs), abs=1e-12)
    assert auc(np.where(planted, 0.0, 1.0), planted) == 1.0


def test_the_interval_of_an_auc_holds_it_19_times_in_20() -> None:
    generator, inside, planted = np.random.default_rng(1), 0, np.arange(50) < 15
    truth = 0.8413447460685429  # P(x > y) for x of mean sqrt(2), y of mean 0, both of variance 1
    for _ in range(1000):
        low, high = auc_interval(auc(generator.normal(np.where(planted, 0, 2**0.5)), planted), 35, 15)
        inside += low <= truth <= high
    assert 0.92 < inside / 1000 < 0.98
    low, high = auc_interval(1.0, 35, 15)
    assert (0.8 < low < 0.99, high) == (True, 1.0)  # all 525 pairs right is no certainty


def test_the_difference_of_two_aucs_is_paired() -> None:
    generator, planted, inside = np.random.default_rng(2), np.arange(60) < 20, 0
    for _ in range(500):
        shared = generator.normal(np.where(planted, 0, 1))
        first, second = (shared + generator.normal(scale=0.5, size=60) for _ in range(2))
        value, low, high = auc_difference(first, second, planted)
        inside += low <= 0 <= high
        assert value == pytest.approx(auc(first, planted) - auc(second, planted), abs=1e-12)
    assert 0.91 < inside / 500 < 0.99
    assert auc_difference(first, first, planted) == (0.0, 0.0, 0.0)


def test_spearman_is_a_correlation_of_ranks() -> None:
    a = np.array([1.0, 4.0, 2.0, 8.0])
    assert spearman(a, a**3) == pytest.approx(1.0)
    assert spearman(a, -a) == pytest.approx(-1.0)
    assert spearman(a, np.array([1.0, 1.0, 2.0, 2.0])) == pytest.approx(1 / 5**0.5)
    assert spearman(a, np.ones(4)) is None


def test_what_a_selection_lacks_is_said() -> None:
    assert doubts(PharmacistArguments(), bf16=True) == []
    (found,) = doubts(PharmacistArguments(num_train_epochs=2), bf16=True)
    assert found.startswith("--num_train_epochs 2: ")
    assert doubts(PharmacistArguments(variant="hypergradient"), bf16=False) == []
    (found,) = doubts(PharmacistArguments(variant="hypergradient"), bf16=True)
    assert found.startswith("--variant hypergradient in bf16: ")
