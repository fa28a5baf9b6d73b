"""Pharmacist's selector training in plain PyTorch, one process, from its formulas: eager attention, every text alone,
the toxic increment merged into dense weights, the inner product of the gradients exact.

It shares nothing with the product but the choice of rows, the tokenised texts, the flags and where the adapters start.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.func import functional_call

from pipeline.curation.pharmacist_settings import PharmacistArguments
from pipeline.training.prepared import Prepared
from tests.numerics.plain import batches, ce, trained_tokens
from tests.numerics.reference import text_nll

Tensors = dict[str, torch.Tensor]


class Plain:
    """The model as a function of the adapter phi and of a scale of the toxic increment."""

    def __init__(self, model: Any, run: Prepared, asked: PharmacistArguments, record: dict[str, Any]) -> None:
        self.model, self.run, self.asked = model, run, asked
        self.phi: Tensors = {name: each.clone().requires_grad_() for name, each in record["initial"].items()}
        self.dense = dict(model.named_parameters())
        self.targets = sorted(
            f"{name}.base_layer.weight"
            for name, each in model.named_modules()
            if name.endswith(tuple(asked.toxic_target_modules)) and hasattr(each, "base_layer")
        )
        self.down = [each.clone().requires_grad_() for each in record.get("down", [])]
        self.up = [
            torch.zeros(len(self.dense[target]), asked.toxic_r, requires_grad=True)
            for target, _ in zip(self.targets, self.down, strict=False)
        ]

    def at(self, phi: Tensors, toxic: float = 0.0) -> Any:
        """The model to call, with `toxic` times the increment in its weights."""
        weights = dict(phi)
        scale = toxic * self.asked.toxic_alpha / self.asked.toxic_r
        for target, down, up in zip(self.targets, self.down, self.up, strict=False):
            weights[target] = self.dense[target] + scale * up @ down
        return lambda **inputs: functional_call(self.model, weights, kwargs=inputs)

    def row_losses(self, phi: Tensors, step: int) -> torch.Tensor:
        """l_i [B]."""
        texts = [text for micro in batches(self.run, "train", step) for text in micro]
        return torch.stack([text_nll(self.at(phi), text) / trained_tokens([text]) for text in texts])

    def attack(self) -> list[float]:
        """Train the increment; returns its losses."""
        tensors, losses = [*self.down, *self.up], []
        optimizer = torch.optim.AdamW(tensors, lr=self.asked.toxic_learning_rate, weight_decay=0.0)
        for step in range(self.run.streams["harmful"].steps(self.asked.toxic_epochs)):
            loss = ce(self.at(self.phi, 1.0), batches(self.run, "harmful", step))
            losses.append(loss.item())
            if losses[-1] < self.asked.toxic_stop_below * losses[0]:
                break
            for each, gradient in zip(tensors, torch.autograd.grad(loss, tensors), strict=True):
                each.grad = gradient
            optimizer.step()
        for each in tensors:
            each.requires_grad_(False)
        return losses

    def cosines(self) -> torch.Tensor:
        """Of each row's gradient with the guide pool's [N]."""
        guide, train = self.run.streams["guide"], self.run.streams["train"]
        steps = -(-len(guide.pool) // guide.layout.global_batch)
        wanted = self.flat(sum(ce(self.at(self.phi), batches(self.run, "guide", step)) for step in range(steps)))
        rows = [self.flat(text_nll(self.at(self.phi), train.pool[i])) for i in range(len(train.pool))]
        return torch.stack([torch.cosine_similarity(each, wanted, dim=0) for each in rows])

    def flat(self, loss: Any) -> torch.Tensor:
        """d loss / d phi as one vector, fp64."""
        found = torch.autograd.grad(loss, list(self.phi.values()), retain_graph=True)
        return torch.cat([each.flatten() for each in found]).double()


def train(plain: Plain) -> dict[str, Any]:
    """The same record as the worker's."""
    asked, run = plain.asked, plain.run
    rows_of, count = run.streams["train"], len(run.streams["train"].pool)
    logits = torch.full((count,), 0.1, dtype=torch.float64, requires_grad=True)
    moments = torch.zeros(3, count, dtype=torch.float64)  # mean, square, steps
    optimizer = torch.optim.AdamW(
        plain.phi.values(), lr=asked.learning_rate, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.0
    )
    record: dict[str, Any] = {"upper": [], "row": [], "of_weights": []}
    if asked.kappa:
        record["attack"] = plain.attack()
    last, sums = torch.zeros(count, dtype=torch.float64), []
    for step in range(run.steps):
        rows = torch.from_numpy(rows_of.global_batch(step))
        weights = count * logits.softmax(0)
        losses = plain.row_losses(plain.phi, step)
        upper = ce(plain.at(plain.phi, asked.kappa), batches(run, "guide", step))
        lower = (weights[rows].detach() * losses).mean()
        if asked.variant == "joint":
            lamb = max(0.0, asked.lamb - asked.lamb_decay * (step * len(rows) // count))
            of_weights = losses.detach().double() / len(rows)
            loss = lamb * upper + (1 - lamb) * lower
        else:
            v = plain.flat(upper)
            products = torch.stack([plain.flat(each) @ v for each in losses])
            of_weights = -asked.learning_rate / len(rows) * products
            loss = lower
        regular = max(0, asked.num_train_epochs * count - step * len(rows))
        rows, of_weights = rows[:regular], of_weights[:regular]
        moved = rows.unique() if asked.selector_update == "lazy" else torch.arange(count)
        held = weights[moved].sum().detach() * logits[moved].softmax(
            0
        )  # the weights, as the logits that move see them
        share = {int(row): place for place, row in enumerate(moved)}
        objective = sum(held[share[int(row)]] * each for row, each in zip(rows, of_weights, strict=True))
        (gradient,) = torch.autograd.grad(objective, logits)
        adam(logits, gradient, moments, moved, asked)
        for each, found in zip(
            plain.phi.values(), torch.autograd.grad(loss.float(), list(plain.phi.values())), strict=True
        ):
            each.grad = found
        torch.nn.utils.clip_grad_norm_(plain.phi.values(), asked.max_grad_norm)
        optimizer.step()
        last[torch.from_numpy(rows_of.global_batch(step))] = losses.detach().double()
        record["upper"].append(upper.item())
        record["row"].append(losses.mean().item())
        record["of_weights"].append(of_weights)
        if step >= run.steps - -(-count // len(rows_of.global_batch(0))):
            sums.append(logits.detach().clone())
    scores = torch.stack(sums).mean(0) if asked.selector_update == "dense" else logits.detach()
    return record | {"last": last, "scores": scores, "weights": (count * logits.softmax(0)).detach()}


def adam(
    logits: torch.Tensor,
    gradient: torch.Tensor,
    moments: torch.Tensor,
    moved: torch.Tensor,
    asked: PharmacistArguments,
) -> None:
    """Adam's formula, one logit after the other."""
    with torch.no_grad():
        for i in moved.tolist():
            g = gradient[i]
            moments[:, i] = torch.stack(
                [0.9 * moments[0, i] + 0.1 * g, 0.95 * moments[1, i] + 0.05 * g * g, moments[2, i] + 1]
            )
            mean, square, steps = moments[:, i]
            logits[i] -= asked.selector_learning_rate * (mean / (1 - 0.9**steps)) / (square / (1 - 0.95**steps)).sqrt()
