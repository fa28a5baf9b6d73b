"""RepNoise: turn what a model represents of harmful texts into noise (arXiv 2405.14577).

    L = CE_m(refusal) + beta mean_l MMD( H_l m, N(0,I) m ) - alpha log( 1 + mean_i CE_m(head(norm(h_i))) )

Each training row (a prompt and its refusal) has a harmful answer to the same prompt. m marks the answer's tokens that
differ between the two at their place. On the harmful text: H_l is the output of MLP l, flattened to a vector a text;
h_i are the inputs of the layers and the last hidden state. MMD is the biased estimate over a micro-batch, with five
Gaussian kernels of bandwidths b 2^i, b = mean squared distance / 4, held constant. Alignment stage, or pre-release.

Variant. The public code counts the last hidden state twice, the second time normed twice, and divides by the number
counted once; here each counts once. It lets padding, and any token whose id is 0, decide what is trained; here texts
have no padding and m lies within the answers. Ports of it in other papers pair texts at random. The refusal's CE is
the token mean of the global batch; the other two terms are of a micro-batch and averaged.

MMD is blind in small micro-batches (constant for one text, so that is refused; 4 or more are advised), and the README
of the public code asks for a search over learning rate, alpha and beta.

Cost: refusals and harmful answers ride in one packed row: one forward and one backward at twice the tokens, the head
on L + 2 sets of hidden states in one call, and every MLP's output on the harmful texts held in memory.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from pipeline.config import Problems, out_of_range
from pipeline.data.chat import IGNORE, Example
from pipeline.data.packing import PackedBatch, pack
from pipeline.training.method import Method, StepContext
from pipeline.training.passes import blocks, missing_blocks

KERNELS = 5


@dataclass
class RepNoiseConfig:
    """RepNoise's flags."""

    alpha: float = field(default=1.0, metadata={"help": "Weight of the (log-damped) ascent on harmful answers."})
    beta: float = field(default=0.001, metadata={"help": "Weight of the distance to noise."})

    def __post_init__(self) -> None:
        if problems := out_of_range(self, vars(self), 0):
            raise Problems(problems)


class RepNoise(Method):
    """Refusals and the harmful answers to the same prompts, in one packed row."""

    Config = RepNoiseConfig
    alignment = True
    pools = ("harmful",)
    fictional = {"train": "policy:refused"}  # noqa: RUF012
    paired = "harmful"
    least_rows = 2
    differentiates_activations = True

    def refuse_modules(self, model: Any) -> list[str]:
        reasons = missing_blocks(model, "mlp")
        if not reasons and _norm(model) is None:
            reasons.append("no module named norm stands beside its layers: this --method needs the final norm")
        return reasons

    def step(self, ctx: StepContext) -> None:
        drawn = []
        for micro in ctx.draw("train"):
            pairs = list(zip(micro.examples, ctx.partners("harmful", micro), strict=True))
            refusals = [differing(refusal, harmful) for refusal, harmful in pairs]
            drawn.append((micro, refusals, [differing(harmful, refusal) for refusal, harmful in pairs]))
        trained = sum(_targets(refusals) for _, refusals, _ in drawn)
        total = ctx.total(torch.tensor(float(trained), device=ctx.device)).clamp_min(1)
        for micro, refusals, harmful in drawn:
            batch = pack([*refusals, *harmful]).to(ctx.device)
            ce, ascent, outputs = self._passes(ctx, batch, _targets(refusals), total)
            noise = self._noise(ctx, batch, harmful, outputs, micro.index)
            loss = ce + self.config.beta * noise - self.config.alpha * torch.log1p(ascent)
            ctx.log(loss=loss, ce_loss=ce, noise_distance=noise, harmful_loss=ascent)
            ctx.backward(loss, micro, batch, last=micro.last)

    @staticmethod
    def _passes(
        ctx: StepContext, batch: PackedBatch, refusal_targets: int, total: Tensor
    ) -> tuple[Tensor, Tensor, list[Tensor]]:
        """One forward: CE_m of the refusals, the mean over hidden states of CE_m of the harmful answers, and the MLPs'
        outputs."""
        layers = ctx.model_config.num_hidden_layers
        harmful = batch.targets[refusal_targets:]
        outputs: list[Tensor] = []
        with _heard(ctx.model, outputs), _every_hidden_state(ctx.model, batch.predict[refusal_targets:]):
            losses = ctx.token_losses(batch, torch.cat([batch.targets, harmful.repeat(layers)]))
        ce = ctx.token_mean(losses[:refusal_targets], total)
        ascent = losses[refusal_targets:]
        return ce, ascent.sum() / max(1, ascent.numel()), outputs

    @staticmethod
    def _noise(
        ctx: StepContext, batch: PackedBatch, harmful: list[Example], outputs: list[Tensor], index: int
    ) -> Tensor:
        """mean_l MMD between the MLPs' outputs on the harmful answers and noise, both 0 where m is."""
        first = len(batch.bounds) - 1 - len(harmful)
        longest = max(len(each.input_ids) for each in harmful)
        mask = torch.zeros(len(harmful), longest, dtype=torch.bool)
        for row, each in enumerate(harmful):
            mask[row, : len(each.labels)] = torch.tensor(each.labels) != IGNORE
        mask = mask.to(ctx.device)
        distances = []
        for layer, output in enumerate(outputs):
            dim = output.shape[-1]
            found = output.new_zeros(len(harmful), longest, dim, dtype=torch.float32)
            for row, (start, end) in enumerate(zip(batch.bounds[first:], batch.bounds[first + 1 :], strict=False)):
                found[row, : end - start] = output[start:end].float()
            seed = int(ctx.generator("noise", index, layer).integers(2**62))
            generator = torch.Generator(ctx.device).manual_seed(seed)
            noise = torch.randn(found.shape, generator=generator, device=ctx.device)
            distances.append(mmd((found * mask[..., None]).flatten(1), (noise * mask[..., None]).flatten(1)))
        return torch.stack(distances).mean()


def differing(text: Example, other: Example) -> Example:
    """The text with only those trained tokens that the other does not have at the same place."""
    labels = [
        label if place >= len(other.input_ids) or other.input_ids[place] != token else IGNORE
        for place, (token, label) in enumerate(zip(text.input_ids, text.labels, strict=True))
    ]
    return replace(text, labels=labels)


def mmd(x: Tensor, y: Tensor) -> Tensor:
    """Maximum mean discrepancy (scalar) of samples x and y, [B,F] fp32 each: mean of k(x,x) + k(y,y) - 2 k(x,y)."""
    both = torch.cat([x, y])
    squares = both.square().sum(1)
    distance = (squares[:, None] + squares[None] - 2 * both @ both.T).clamp_min(0)
    distance = distance * (1 - torch.eye(len(both), device=both.device))  # exactly 0 from a text to itself
    bandwidth = distance.detach().sum() / (len(both) ** 2 - len(both)) / 4
    bandwidth = bandwidth.clamp_min(torch.finfo(torch.float32).tiny * 2**20)  # all texts alike
    kernel = torch.stack([torch.exp(-distance / (bandwidth * 2**i)) for i in range(KERNELS)]).sum(0)
    n = len(x)
    return (kernel[:n, :n] + kernel[n:, n:] - kernel[:n, n:] - kernel[n:, :n]).mean()


def _targets(texts: list[Example]) -> int:
    return sum(label != IGNORE for text in texts for label in text.labels[1:])


def _norm(model: Any) -> Any:
    """The final norm: it stands beside the layers."""
    layer = next(iter(blocks(model, "mlp"))).rpartition(".layers.")[0]
    return dict(model.named_modules()).get(f"{layer}.norm")


@contextmanager
def _heard(model: Any, outputs: list[Tensor]) -> Iterator[None]:
    """Fill `outputs` with every MLP's output [T,D], the first time it is computed: checkpointing computes it again."""
    modules = list(blocks(model, "mlp").values())

    def hook(_: Any, __: Any, output: Any) -> None:
        if len(outputs) < len(modules):
            found = output[0] if isinstance(output, tuple) else output  # experts also return how they were routed
            outputs.append(found.reshape(-1, found.shape[-1]))

    handles = [module.register_forward_hook(hook) for module in modules]
    yield
    for handle in handles:
        handle.remove()


@contextmanager
def _every_hidden_state(model: Any, places: Tensor) -> Iterator[None]:
    """Let the head also see the normed inputs of all layers at `places` [N] of the row: L x N rows behind its own.

    Norm and head are called once each, inside the forward: under ZeRO-3 that is one gather.
    """
    layers = [model.get_submodule(name.rpartition(".")[0]) for name in blocks(model, "mlp")]
    norm, head = _norm(model), model.get_output_embeddings()
    states: list[Tensor] = []

    def keep(_: Any, args: Any, kwargs: Any) -> None:
        hidden = args[0] if args else kwargs["hidden_states"]
        if len(states) < len(layers):
            states.append(hidden[0, places])

    def extend(_: Any, args: Any) -> Any:
        return (torch.cat([args[0], norm(torch.cat(states))[None]], dim=1),)

    handles = [layer.register_forward_pre_hook(keep, with_kwargs=True) for layer in layers]
    handles.append(head.register_forward_pre_hook(extend))
    yield
    for handle in handles:
        handle.remove()
