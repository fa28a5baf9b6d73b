"""The methods in plain PyTorch, one process, from their formulas: eager attention, every text alone.

They share nothing with the product but the choice of rows, the tokenised texts and the flags.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

from pipeline.data.streams import generator
from pipeline.training.prepared import Prepared
from tests.numerics.reference import text_nll

Batches = list[list[Any]]
Gradients = dict[str, torch.Tensor]


def batches(run: Prepared, stream: str, step: int) -> Batches:
    """The micro-batches of a step's global batch, over all ranks."""
    source, rows = run.streams[stream], run.train.per_device_train_batch_size
    texts = [source.pool[int(i)] for i in source.global_batch(step)]
    return [texts[first : first + rows] for first in range(0, len(texts), rows)]


def trained_tokens(texts: list[Any]) -> int:
    """Tokens that are predicted."""
    return sum(label != -100 for text in texts for label in text.labels[1:])


def parts(model: Any, drawn: Batches) -> Iterator[torch.Tensor]:
    """Each micro-batch's cross-entropy; their mean is the global batch's token mean."""
    trained = trained_tokens([text for texts in drawn for text in texts])
    for texts in drawn:
        yield sum(text_nll(model, text) for text in texts) * len(drawn) / trained


def ce(model: Any, drawn: Batches) -> torch.Tensor:
    """The global batch's token-mean cross-entropy."""
    return torch.stack(list(parts(model, drawn))).mean()


def parameters(model: Any) -> dict[str, torch.Tensor]:
    """The trained ones."""
    return {name: each for name, each in model.named_parameters() if each.requires_grad}


def gradient(model: Any, loss: torch.Tensor) -> Gradients:
    """d loss / d trained parameters."""
    named = parameters(model)
    found = torch.autograd.grad(loss, list(named.values()), allow_unused=True)
    return {n: torch.zeros_like(p) if g is None else g for (n, p), g in zip(named.items(), found, strict=True)}


@contextmanager
def hooked(model: Any, role: str, layers: list[int], hook: Callable[[torch.Tensor], torch.Tensor]) -> Iterator[None]:
    """The outputs of some layers' modules go through `hook`, in the order of the calls."""

    def on(_: Any, __: Any, output: Any) -> Any:
        return (hook(output[0]), *output[1:]) if isinstance(output, tuple) else hook(output)

    modules = [model.get_submodule(f"{prefix(model)}.layers.{layer}.{role}") for layer in layers]
    handles = [module.register_forward_hook(on) for module in modules]
    yield
    for handle in handles:
        handle.remove()


def prefix(model: Any) -> str:
    """Where the layers are, under an adapter or not."""
    return "base_model.model.model" if hasattr(model, "peft_config") else "model"


def vaccine(model: Any, drawn: Batches, rho: float, scope: str, layers: list[int]) -> torch.Tensor:
    """The mean over micro-batches of the cross-entropy under the worst shift of the attention outputs."""
    outputs: list[list[torch.Tensor]] = []

    def keep(a: torch.Tensor) -> torch.Tensor:
        outputs[-1].append(a)
        return a

    slopes = []
    with hooked(model, "self_attn", layers, keep):
        clean = parts(model, drawn)
        for _ in drawn:
            outputs.append([])
            slopes.append(torch.autograd.grad(next(clean), outputs[-1]))
    squares = [sum(float(g.square().sum()) for g in each) for each in slopes]
    if scope == "global":
        squares = [sum(squares)] * len(squares)
    shifts = [rho * g / (square**0.5 + 1e-7) for each, square in zip(slopes, squares, strict=True) for g in each]
    with hooked(model, "self_attn", layers, lambda a: a + shifts.pop(0)):
        return ce(model, drawn)


def train(
    model: Any, run: Prepared, slope: Callable[[Any, Prepared, int, dict[str, Any]], Gradients]
) -> dict[str, Any]:
    """The run's steps with AdamW and clipping, on the gradient that `slope` gives; the same record as the worker's."""
    named, settings = parameters(model), run.train
    optimizer = torch.optim.AdamW(
        named.values(), lr=settings.learning_rate, betas=(settings.adam_beta1, settings.adam_beta2),
        eps=settings.adam_epsilon, weight_decay=0.0,
    )  # fmt: skip
    record: dict[str, Any] = {
        "initial": {n: p.detach().clone() for n, p in named.items()}, "norms": [], "losses": [],
    }  # fmt: skip
    for step in range(run.steps):
        for name, each in slope(model, run, step, record).items():
            named[name].grad = each.clone()
        if step == 0:
            record["gradients"] = {n: p.grad.clone() for n, p in named.items()}
        record["norms"].append(float(torch.nn.utils.clip_grad_norm_(named.values(), settings.max_grad_norm)))
        optimizer.step()
        if "undo" in record:
            record.pop("undo")(optimizer)
    record["final"] = {n: p.detach().clone() for n, p in named.items()}
    return record


def sft_step(model: Any, run: Prepared, step: int, record: dict[str, Any]) -> Gradients:
    """Plain cross-entropy."""
    loss = ce(model, batches(run, "train", step))
    record["losses"].append(loss.item())
    return gradient(model, loss)


def vaccine_step(model: Any, run: Prepared, step: int, record: dict[str, Any]) -> Gradients:
    """Vaccine."""
    config, layers = run.method.config, list(range(model.config.num_hidden_layers))
    loss = vaccine(model, batches(run, "train", step), config.rho, config.scope, layers)
    record["losses"].append(loss.item())
    return gradient(model, loss)


def booster_step(model: Any, run: Prepared, step: int, record: dict[str, Any]) -> Gradients:
    """g = grad f(w) + lamb (grad h(w) - grad h(w')), w' one normalised harmful step of length perturb_alpha away."""
    config, named = run.method.config, parameters(model)
    harmful, drawn = batches(run, "harmful", step), batches(run, "train", step)
    h = ce(model, harmful)
    here = gradient(model, h)
    norm = torch.stack([each.square().sum() for each in here.values()]).sum().sqrt()
    saved = {name: each.detach().clone() for name, each in named.items()}
    with torch.no_grad():
        for name, each in named.items():
            each -= config.perturb_alpha * here[name] / (norm + 1e-7)
    h_there = ce(model, harmful)
    there = gradient(model, h_there)
    with torch.no_grad():
        for name, each in named.items():
            each.copy_(saved[name])
    layers = list(range(model.config.num_hidden_layers))
    f = vaccine(model, drawn, config.rho, "micro_batch", layers) if config.rho else ce(model, drawn)
    record["losses"].append((f + config.lamb * (h - h_there)).item())
    return {name: each + config.lamb * (here[name] - there[name]) for name, each in gradient(model, f).items()}


def lisa_step(model: Any, run: Prepared, step: int, record: dict[str, Any]) -> Gradients:
    """Two states in turn; each is pulled to where the other ended, once the warm-in is over."""
    config, named = run.method.config, parameters(model)
    snapshots = record.setdefault(
        "snapshots", {"guide": record["initial"], "train": record["initial"], "last": "guide"}
    )
    cycle = config.alignment_steps + config.finetune_steps
    state = "guide" if step % cycle < config.alignment_steps else "train"
    if state != snapshots["last"]:
        snapshots[snapshots["last"]] = {name: each.detach().clone() for name, each in named.items()}
        snapshots["last"] = state
    loss = ce(model, batches(run, state, step))
    if step >= config.proximal_after * run.steps:
        other = snapshots["train" if state == "guide" else "guide"]
        loss = loss + config.rho / 2 * sum((each - other[name]).square().sum() for name, each in named.items())
    record["losses"].append(loss.item())
    return gradient(model, loss)


def t_vaccine_step(model: Any, run: Prepared, step: int, record: dict[str, Any]) -> Gradients:
    """Vaccine over the drawn layers; the attention of the others stays, and so do its moments."""
    config, count, named = run.method.config, model.config.num_hidden_layers, parameters(model)
    memory = record.setdefault("memory", {"drawn": []})
    if step % config.score_every == 0:
        outputs: list[torch.Tensor] = []
        with hooked(model, "self_attn", list(range(count)), lambda a: outputs.append(a) or a):
            slopes = torch.autograd.grad(ce(model, batches(run, "harmful", step)), outputs)
        # The calls are text by text, layer by layer.
        scores = [sum(float(g.double().square().sum()) for g in slopes[layer::count]) ** 0.5 for layer in range(count)]
        memory["p"] = [each / sum(scores) for each in scores]
    if step % config.resample_every == 0:
        draw = generator(run.train.seed, step, "layers")
        memory["drawn"] = sorted(draw.choice(count, size=config.perturbed_layers, replace=False, p=memory["p"]))
    record.setdefault("drawn", []).append([int(each) for each in memory["drawn"]])
    loss = vaccine(model, batches(run, "train", step), config.rho, "micro_batch", memory["drawn"])
    record["losses"].append(loss.item())
    found = gradient(model, loss)
    others = [layer for layer in range(count) if layer not in memory["drawn"]]
    frozen = [name for name in named for layer in others if f"layers.{layer}.self_attn." in name]
    saved = {name: named[name].detach().clone() for name in frozen}

    def undo(optimizer: torch.optim.Optimizer) -> None:
        moments = memory.setdefault("moments", {})
        for name, each in named.items():
            now = {key: optimizer.state[each][key] for key in ("exp_avg", "exp_avg_sq")}
            if name in frozen:
                with torch.no_grad():
                    each.copy_(saved[name])
                for key, value in now.items():
                    value.copy_(moments[name][key] if name in moments else torch.zeros_like(value))
            moments[name] = {key: value.clone() for key, value in now.items()}

    record["undo"] = undo
    return {name: torch.zeros_like(each) if name in frozen else each for name, each in found.items()}


STEPS = {
    "sft": sft_step,
    "vaccine": vaccine_step,
    "booster": booster_step,
    "lisa": lisa_step,
    "t_vaccine": t_vaccine_step,
}
