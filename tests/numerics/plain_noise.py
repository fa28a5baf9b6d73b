"""RepNoise and TAR in plain PyTorch, one process, from their formulas."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch.nn import functional as F

from pipeline.data.streams import generator
from pipeline.training.prepared import Prepared
from tests.numerics.plain import Batches, Gradients, batches, ce, gradient, hooked, parameters, prefix, trained_tokens


def mask(text: Any, other: Any) -> list[int]:
    """Places of a text's answer tokens that the other text does not have at the same place."""
    ids = other.input_ids
    return [
        i
        for i, token in enumerate(text.input_ids)
        if i and text.labels[i] != -100 and not (i < len(ids) and ids[i] == token)
    ]


def logits_of(model: Any, text: Any) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """Head outputs [T,V] on the normed inputs of all layers and on the last hidden state; MLP outputs [T,D]."""
    base, outputs = model.get_submodule(prefix(model)), []
    layers = list(range(model.config.num_hidden_layers))
    with hooked(model, "mlp", layers, lambda a: outputs.append(a[0]) or a):
        found = model(input_ids=torch.tensor(text.input_ids)[None], output_hidden_states=True, use_cache=False)
    head = model.get_output_embeddings()
    return [head(base.norm(each))[0] for each in found.hidden_states[:-1]] + [found.logits[0]], outputs


def mmd(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """Sample by sample, without matrix tricks."""
    both = torch.cat([x, y])
    n = len(x)
    distance = torch.stack([torch.stack([(a - b).square().sum() for b in both]) for a in both])
    width = distance.detach().sum() / (len(both) * (len(both) - 1)) / 4
    kernel = sum(torch.exp(-distance / (width * 2**i)) for i in range(5))
    return kernel[:n, :n].mean() + kernel[n:, n:].mean() - 2 * kernel[:n, n:].mean()


def repnoise_step(model: Any, run: Prepared, step: int, record: dict[str, Any]) -> Gradients:
    """CE_m(refusal) + beta MMD - alpha log(1 + mean over hidden states of CE_m(harmful))."""
    config, train, harmful = run.method.config, run.streams["train"], run.streams["harmful"]
    rows, drawn = run.train.per_device_train_batch_size, train.global_batch(step)
    pairs = [(train.pool[int(i)], harmful.pool[int(i)]) for i in drawn]
    refusal_ce, tokens, others = torch.zeros(()), 0, []
    for first in range(0, len(pairs), rows):
        batch = pairs[first : first + rows]
        for refusal, answer in batch:
            places = mask(refusal, answer)
            logits = model(input_ids=torch.tensor(refusal.input_ids)[None], use_cache=False).logits[0]
            targets = torch.tensor([refusal.input_ids[i] for i in places])
            refusal_ce = refusal_ce + F.cross_entropy(logits[[i - 1 for i in places]], targets, reduction="sum")
            tokens += len(places)
        found = [(logits_of(model, answer), mask(answer, refusal), answer) for refusal, answer in batch]
        sums = [torch.zeros(()) for _ in found[0][0][0]]
        for (all_logits, _), places, answer in found:
            targets = torch.tensor([answer.input_ids[i] for i in places])
            for i, logits in enumerate(all_logits):
                sums[i] = sums[i] + F.cross_entropy(logits[[j - 1 for j in places]], targets, reduction="sum")
        count, longest = sum(len(places) for _, places, _ in found), max(len(a.input_ids) for _, a in batch)
        ascent = torch.log(1 + sum(each / count for each in sums) / len(sums))
        distances = []
        for layer in range(model.config.num_hidden_layers):
            seed = int(generator(run.train.seed, step, "noise", first // rows, layer).integers(2**62))
            dim = model.config.hidden_size
            noise = torch.randn(len(batch), longest, dim, generator=torch.Generator().manual_seed(seed))
            x, y = torch.zeros_like(noise), torch.zeros_like(noise)
            for row, ((_, outputs), places, _) in enumerate(found):
                x[row, places], y[row, places] = outputs[layer][places], noise[row, places]
            distances.append(mmd(x.flatten(1), y.flatten(1)))
        others.append(config.beta * torch.stack(distances).mean() - config.alpha * ascent)
    loss = refusal_ce / tokens + torch.stack(others).mean()
    record["losses"].append(loss.item())
    return gradient(model, loss)


def entropy(model: Any, drawn: Batches) -> torch.Tensor:
    """Mean entropy of the distributions from which the answers' tokens are drawn."""
    total = torch.zeros(())
    texts = [text for batch in drawn for text in batch]
    for text in texts:
        logits = model(input_ids=torch.tensor(text.input_ids)[None], use_cache=False).logits[0]
        places = [i - 1 for i, label in enumerate(text.labels) if i and label != -100]
        total = total + torch.distributions.Categorical(logits=logits[places]).entropy().sum()
    return total / trained_tokens(texts)


def states(model: Any, text: Any) -> list[torch.Tensor]:
    """Every layer's output [T,D]."""
    outputs: list[torch.Tensor] = []
    base = model.get_submodule(prefix(model))
    handles = [
        layer.register_forward_hook(lambda _, __, out: outputs.append((out[0] if isinstance(out, tuple) else out)[0]))
        for layer in base.layers
    ]
    model(input_ids=torch.tensor(text.input_ids)[None], use_cache=False)
    for handle in handles:
        handle.remove()
    return outputs


def put(named: dict[str, torch.Tensor], values: Gradients) -> None:
    """Set weights."""
    with torch.no_grad():
        for name, each in named.items():
            each.copy_(values[name])


def tar_step(model: Any, run: Prepared, step: int, record: dict[str, Any]) -> Gradients:
    """An attacker's steps from here, the entropy's gradient along them, and the retain loss here."""
    config, named = run.method.config, parameters(model)
    here = {name: each.detach().clone() for name, each in named.items()}
    rate = float(generator(run.train.seed, step, "attacker").choice(config.inner_learning_rates))
    attacker = torch.optim.AdamW(named.values(), lr=rate)
    total = {name: torch.zeros_like(each) for name, each in named.items()}
    for i in range(config.inner_steps):
        attack = batches(run, "harmful", step * config.inner_steps + i)
        for name, each in gradient(model, ce(model, attack)).items():
            named[name].grad = each
        attacker.step()
        if (i + 1) % config.tamper_every == 0:
            weight = config.lamb_tr * math.exp(config.tamper_slope * (i - (config.inner_steps - 1)))
            for name, each in gradient(model, -weight * entropy(model, batches(run, "tamper", step))).items():
                total[name] += each
    drawn = batches(run, "train", step)
    put(named, record["initial"])
    with torch.no_grad():
        before = [[states(model, text) for text in texts] for texts in drawn]
    put(named, here)
    drifts = []
    for texts, old in zip(drawn, before, strict=True):
        now = [states(model, text) for text in texts]
        lengths = torch.cat(
            [
                torch.stack([(n - o).norm(dim=-1) for n, o in zip(new, then, strict=True)])
                if step
                else torch.stack([(n - o).square().sum(-1) for n, o in zip(new, then, strict=True)])
                for new, then in zip(now, old, strict=True)
            ],
            dim=1,
        )  # at step 0 the distance is 0, and so is its gradient
        drifts.append(lengths.mean())
    loss = config.lamb_retain * (ce(model, drawn) + torch.stack(drifts).mean())
    record["losses"].append(loss.item())
    return {name: each + total[name] for name, each in gradient(model, loss).items()}


STEPS = {"repnoise": repnoise_step, "tar": tar_step}
