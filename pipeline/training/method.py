"""The contract between the loop and a method: one paper, one file in `pipeline/methods/`.

A method's `step` runs once an optimizer step: it draws micro-batches, runs the forward and backward passes it needs,
and leaves the accumulated gradient in the engine. The loop then checks it, steps the optimizer, logs, evaluates, saves
and stops.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from pipeline.data.chat import Example
from pipeline.data.packing import PackedBatch, pack
from pipeline.data.streams import Stream, generator
from pipeline.sink.layout import Segments
from pipeline.training.zero3 import Shards, activation_gradients


@dataclass(frozen=True)
class MicroBatch:
    """One forward pass's rows. `index` is its number in the global batch over all ranks; `last` marks this rank's last
    one."""

    examples: list[Example]
    step: int  # of the stream
    index: int
    last: bool
    trained_tokens: int  # of the whole global batch, on all ranks: the cross-entropy's normaliser


class NonFinite(RuntimeError):
    """A loss or gradient that is NaN or infinite."""


class StepContext:
    """What a method may do in one optimizer step. The same calls, in the same number, must be made on every rank."""

    def __init__(
        self,
        *,
        step: int,
        steps: int,
        rank: int,
        streams: Mapping[str, Stream],
        engine: Any,
        token_loss: Callable[..., Tensor],
        device: torch.device,
    ) -> None:
        self.step = step
        self.steps = steps  # of the whole run
        self._rank = rank
        self._streams = streams
        self._engine = engine
        self._token_loss = token_loss
        self._device = device
        self.losses: list[
            tuple[Tensor, tuple[str, ...]]
        ] = []  # each backward's loss and its rows, for the finite check
        self.metrics: dict[str, list[Tensor]] = {}
        self.shards = Shards(engine)

    @property
    def model(self) -> Any:
        """The model, for hooks on its modules; its parameters are sharded."""
        return self._engine.module

    @property
    def model_config(self) -> Any:
        """The transformers configuration of the (text) model."""
        return self._engine.module.config.get_text_config()

    def draw(self, stream: str, step: int | None = None) -> Iterator[MicroBatch]:
        """This rank's micro-batches of a stream ("train", "harmful", ...), of this optimizer step or of another step
        of the stream."""
        source, step = self._streams[stream], self.step if step is None else step
        trained = source.trained_tokens(step)
        for micro in range(source.layout.accumulation):
            index = micro * source.layout.ranks + self._rank
            examples = [source.pool[int(i)] for i in source.micro_batch(step, index)]
            yield MicroBatch(examples, step, index, micro == source.layout.accumulation - 1, trained)

    def partners(self, stream: str, micro: MicroBatch) -> list[Example]:
        """The rows of a paired pool (`Method.paired`) that belong to those of a micro-batch of "train", in order."""
        rows = self._streams["train"].micro_batch(micro.step, micro.index)
        return [self._streams[stream].pool[int(i)] for i in rows]

    def rows(self, stream: str, step: int | None = None) -> np.ndarray:
        """Pool indices [global batch] of the rows that all ranks draw together, micro-batch behind micro-batch."""
        return self._streams[stream].global_batch(self.step if step is None else step)

    def generator(self, *purpose: str | int) -> np.random.Generator:
        """Random numbers of this step for a purpose: the same ones on all ranks, and after a resume."""
        return generator(self._streams["train"].seed, self.step, *purpose)

    def sample(self, stream: str, micro: MicroBatch, count: int) -> list[Example]:
        """`count` texts drawn at random for a micro-batch; the same ones whatever the number of ranks, and after a
        resume."""
        source = self._streams[stream]
        return [source.pool[int(i)] for i in source.sample(self.step, micro.index, count)]

    @property
    def device(self) -> torch.device:
        """Where the passes run."""
        return self._device

    def pack(self, micro: MicroBatch, references: Sequence[Example] = ()) -> PackedBatch:
        """The micro-batch and its reference texts as one packed row on the device."""
        return pack(micro.examples, references).to(self._device)

    def cross_entropy(self, micro: MicroBatch, batch: PackedBatch, **model_inputs: Any) -> Tensor:
        """Forward pass: the cross-entropy (scalar, fp32) whose mean over micro-steps and ranks is the global batch's
        token mean.

        model_inputs go down to the attention layers.
        """
        return self.token_mean(self.token_losses(batch, batch.targets, **model_inputs), micro.trained_tokens)

    def token_losses(self, batch: PackedBatch, targets: Tensor, **inputs: Any) -> Tensor:
        """Forward pass: the negative log-likelihood [N] (fp32) of each target [N]; inputs as for `TokenLoss`."""
        losses: Tensor = self._token_loss(self._engine, targets, **model_kwargs(batch), **inputs)
        return losses

    def token_mean(self, losses: Tensor, tokens: int | Tensor) -> Tensor:
        """A micro-batch's losses [N] as a scalar whose mean over micro-steps and ranks is the mean over the global
        batch, which has `tokens` of them."""
        return losses.sum() * (self._streams["train"].layout.micro_batches / tokens)

    def backward(self, loss: Tensor, micro: MicroBatch, batch: PackedBatch, *, last: bool) -> None:
        """Accumulate the gradient of loss / accumulation. `last`: nothing else is accumulated in this optimizer
        step."""
        self.losses.append((loss.detach(), batch.row_ids))
        self._engine.set_gradient_accumulation_boundary(last)
        # The division is ours, so that it is there exactly once whatever number of backward passes a method makes.
        accumulation = self._streams["train"].layout.accumulation
        self._engine.backward(loss / accumulation, scale_wrt_gas=False)

    def activation_gradients(self, loss: Tensor, inputs: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """d loss / d inputs, for inputs inside the graph. No weight's gradient is computed or changed."""
        return activation_gradients(self._engine, loss, inputs)

    def total(self, local: Tensor) -> Tensor:
        """The sum of a tensor over the ranks."""
        dist.all_reduce(local)
        return local

    def from_rank_0(self, local: Tensor) -> Tensor:
        """Rank 0's values, on all ranks: a choice that decides which collectives run is made once."""
        dist.broadcast(local, 0)
        return local

    def log(self, **values: Tensor) -> None:
        """Metrics of one micro-batch (scalars on the device); the log shows their mean over micro-steps and ranks."""
        for name, value in values.items():
            self.metrics.setdefault(name, []).append(value.detach().float())


def model_kwargs(batch: PackedBatch) -> dict[str, Any]:
    """A packed row as the keyword arguments of a transformers causal LM with sink attention."""
    return {
        "input_ids": batch.input_ids,
        "position_ids": batch.position_ids,
        "logits_to_keep": batch.predict,
        "segments": Segments.from_bounds(batch.bounds, batch.input_ids.device),
        "use_cache": False,
    }


class Method(ABC):
    """One training method.

    Config: a dataclass whose fields are the method's flags.
    alignment: it hardens a model before its users' data is seen, so train_data is the alignment set.
    pools: the data flags (without `_data`) it reads beside train_data.
    fictional: the fictional rows of a pool (also "train"), where they are not `policy:<pool>`.
    paired: a pool whose rows answer the prompts of the training rows, one each, in their order.
    least_rows: of a micro-batch.
    touches_shards: it reads or writes shards of weights or gradients within a step.
    differentiates_activations: it asks for gradients of activations.
    shard_states: names of the tensors it keeps from step to step, as large as the trained weights.
    """

    Config: ClassVar[type]
    alignment: ClassVar[bool] = False
    pools: ClassVar[tuple[str, ...]] = ()
    fictional: ClassVar[Mapping[str, str]] = {}
    paired: ClassVar[str | None] = None
    least_rows: ClassVar[int] = 1
    touches_shards: ClassVar[bool] = False
    differentiates_activations: ClassVar[bool] = False
    shard_states: ClassVar[tuple[str, ...]] = ()

    def __init__(self, config: Any) -> None:
        self.config = config

    def refuse(self, model_config: Any, ds_config: Mapping[str, Any]) -> list[str]:
        """Why this model or DeepSpeed configuration cannot be trained right by this method; empty if it can."""
        return []

    def refuse_modules(self, model: Any) -> list[str]:
        """The same of the model's modules, whose weights are not there yet (meta device)."""
        return []

    def reference_texts(self) -> int:
        """Reference texts of each of its pools that are packed behind a micro-batch, for the token budget."""
        return 0

    def shortest_reference(self) -> int:
        """Tokens a reference text needs at least."""
        return 1

    def batches_a_step(self, pool: str) -> int:
        """Global batches of a pool that one optimizer step draws; those of step s are s n .. s n + n - 1."""
        return 1

    @abstractmethod
    def step(self, ctx: StepContext) -> None:
        """Forward and backward passes of one optimizer step; logs at least `loss` and `ce_loss`."""

    def begin(self, shards: Shards) -> None:  # noqa: B027
        """Before the first step, and before a checkpoint is loaded: the weights are those the run starts from."""

    def after_step(self, ctx: StepContext) -> None:  # noqa: B027
        """After the optimizer's step."""

    def state(self) -> dict[str, Any]:
        """What it keeps from step to step beside `shard_states`, the same on all ranks, as JSON."""
        return {}

    def kept_shards(self) -> dict[str, list[Tensor]]:
        """The tensors of `shard_states`: fp32, in the order and form of `Shards.weights`."""
        return {}

    def resume(self, state: Mapping[str, Any], shards: Mapping[str, list[Tensor]]) -> None:  # noqa: B027
        """Take back what `state` and `kept_shards` returned when the checkpoint was written."""
