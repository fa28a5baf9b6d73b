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

import torch
from torch import Tensor

from pipeline.data.chat import Example
from pipeline.data.packing import PackedBatch, pack
from pipeline.data.streams import Stream
from pipeline.sink.layout import Segments


@dataclass(frozen=True)
class MicroBatch:
    """One forward pass's rows. `index` is its number in the global batch over all ranks; `last` marks this rank's last
    one."""

    examples: list[Example]
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
        rank: int,
        streams: Mapping[str, Stream],
        engine: Any,
        token_loss: Callable[..., Tensor],
        device: torch.device,
    ) -> None:
        self.step = step
        self._rank = rank
        self._streams = streams
        self._engine = engine
        self._token_loss = token_loss
        self._device = device
        self.losses: list[
            tuple[Tensor, tuple[str, ...]]
        ] = []  # each backward's loss and its rows, for the finite check
        self.metrics: dict[str, list[Tensor]] = {}

    @property
    def model_config(self) -> Any:
        """The transformers configuration of the (text) model."""
        return self._engine.module.config.get_text_config()

    def draw(self, stream: str) -> Iterator[MicroBatch]:
        """This rank's micro-batches of this step from a stream ("train", "harmful", ...)."""
        source = self._streams[stream]
        trained = source.trained_tokens(self.step)
        for micro in range(source.layout.accumulation):
            index = micro * source.layout.ranks + self._rank
            examples = [source.pool[int(i)] for i in source.micro_batch(self.step, index)]
            yield MicroBatch(examples, index, micro == source.layout.accumulation - 1, trained)

    def sample(self, stream: str, micro: MicroBatch, count: int) -> list[Example]:
        """`count` texts drawn at random for a micro-batch; the same ones whatever the number of ranks, and after a
        resume."""
        source = self._streams[stream]
        return [source.pool[int(i)] for i in source.sample(self.step, micro.index, count)]

    def pack(self, micro: MicroBatch, references: Sequence[Example] = ()) -> PackedBatch:
        """The micro-batch and its reference texts as one packed row on the device."""
        return pack(micro.examples, references).to(self._device)

    def cross_entropy(self, micro: MicroBatch, batch: PackedBatch, **model_inputs: Any) -> Tensor:
        """Forward pass: the cross-entropy (scalar, fp32) whose mean over micro-steps and ranks is the global batch's
        token mean.

        model_inputs go down to the attention layers.
        """
        nll = self._token_loss(self._engine, batch.targets, **model_kwargs(batch), **model_inputs)
        layout = self._streams["train"].layout
        return nll.sum() * (layout.micro_batches / micro.trained_tokens)

    def backward(self, loss: Tensor, micro: MicroBatch, batch: PackedBatch, *, last: bool) -> None:
        """Accumulate the gradient of loss / accumulation. `last`: nothing else is accumulated in this optimizer
        step."""
        self.losses.append((loss.detach(), batch.row_ids))
        self._engine.set_gradient_accumulation_boundary(last)
        # The division is ours, so that it is there exactly once whatever number of backward passes a method makes.
        accumulation = self._streams["train"].layout.accumulation
        self._engine.backward(loss / accumulation, scale_wrt_gas=False)

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

    Config: a dataclass whose fields are the method's flags. pools: the data flags (without `_data`) it reads beside
    train_data.
    """

    Config: ClassVar[type]
    pools: ClassVar[tuple[str, ...]] = ()

    def __init__(self, config: Any) -> None:
        self.config = config

    def refuse(self, model_config: Any, ds_config: Mapping[str, Any]) -> list[str]:
        """Why this model or DeepSpeed configuration cannot be trained right by this method; empty if it can."""
        return []

    def reference_texts(self) -> int:
        """Reference texts of each of its pools that are packed behind a micro-batch, for the token budget."""
        return 0

    def shortest_reference(self) -> int:
        """Tokens a reference text needs at least."""
        return 1

    @abstractmethod
    def step(self, ctx: StepContext) -> None:
        """Forward and backward passes of one optimizer step; logs at least `loss` and `ce_loss`."""
