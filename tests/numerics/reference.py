"""Surgery in plain PyTorch, one process, from the formula: eager attention, every text alone,
`output_attentions=True`.

It shares nothing with the product but the choice of rows and the tokenised texts.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.nn import functional as F

from pipeline.methods.surgery import numbers
from pipeline.training.prepared import Prepared


def text_nll(model: Any, example: Any) -> torch.Tensor:
    """Sum of the negative log-likelihoods of a text's trained tokens."""
    ids, labels = torch.tensor(example.input_ids), torch.tensor(example.labels)
    logits = model(input_ids=ids[None], use_cache=False).logits[0]
    return F.cross_entropy(logits[:-1], labels[1:], ignore_index=-100, reduction="sum")


def sink_means(model: Any, example: Any, position: int) -> torch.Tensor:
    """a_lh [L,H]: the mean attention on the sink key over the queries after it."""
    attentions = model(
        input_ids=torch.tensor(example.input_ids)[None], output_attentions=True, use_cache=False
    ).attentions
    return torch.stack([layer[0, :, position + 1 :, position].mean(-1) for layer in attentions])


def global_loss(model: Any, run: Prepared, step: int, ranks: int) -> tuple[torch.Tensor, torch.Tensor]:
    """(cross-entropy, penalty R) of optimizer step `step` of a run on `ranks` ranks."""
    train = run.streams["train"]
    micro_batches = run.train.gradient_accumulation_steps * ranks
    rows = run.train.per_device_train_batch_size
    nll, trained = torch.zeros(()), 0
    penalty = torch.zeros(())
    for index in range(micro_batches):
        for i in train.global_batch(step)[index * rows : (index + 1) * rows]:
            example = train.pool[int(i)]
            nll = nll + text_nll(model, example)
            trained += sum(label != -100 for label in example.labels[1:])
        if run.method_name == "surgery" and step % run.method.config.penalty_every == 0:
            config, kinds = run.method.config, []
            for kind in ("harmful", "harmless"):
                stream = run.streams[kind]
                drawn = stream.sample(step, index, config.references_per_step)
                texts = [sink_means(model, stream.pool[int(i)], config.sink_token_position) for i in drawn]
                kinds.append(torch.stack(texts).mean(0))
            layers = numbers("layers", config.layers) or list(range(len(kinds[0])))
            heads = numbers("heads", config.heads) or list(range(len(kinds[0][0])))
            divergence = (kinds[0] - kinds[1])[layers][:, heads]
            penalty = penalty + torch.relu(divergence).mean() / micro_batches
    return nll / trained, penalty


def train(model: Any, run: Prepared, ranks: int) -> dict[str, Any]:
    """The run's steps with AdamW and clipping; the same record as the worker's."""
    # The penalty of every N-th step counts N times.
    alpha = getattr(run.method.config, "alpha", 0.0) * getattr(run.method.config, "penalty_every", 1)
    parameters = {name: each for name, each in model.named_parameters() if each.requires_grad}
    settings = run.train
    optimizer = torch.optim.AdamW(
        parameters.values(), lr=settings.learning_rate, betas=(settings.adam_beta1, settings.adam_beta2),
        eps=settings.adam_epsilon, weight_decay=0.0,
    )  # fmt: skip
    record: dict[str, Any] = {
        "initial": {n: p.detach().clone() for n, p in parameters.items()}, "ce": [], "penalty": [], "norms": [],
    }  # fmt: skip
    for step in range(run.steps):
        optimizer.zero_grad()
        ce, penalty = global_loss(model, run, step, ranks)
        (ce + alpha * penalty).backward()
        if step == 0:
            record["gradients"] = {n: p.grad.clone() for n, p in parameters.items()}
        record["norms"].append(float(torch.nn.utils.clip_grad_norm_(parameters.values(), settings.max_grad_norm)))
        record["ce"].append(ce.item())
        record["penalty"].append(penalty.item())
        optimizer.step()
    record["final"] = {n: p.detach().clone() for n, p in parameters.items()}
    return record
