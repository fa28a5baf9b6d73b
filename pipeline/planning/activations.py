"""What a forward and backward pass keeps on a device, and what it gathers, for a model of any size.

A few layers are traced (`tracing.py`), enough to show every kind of layer; what the others add is what a traced layer
of their kind added.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from torch import nn

from pipeline.planning.gathering import Gathers, extend, gathers
from pipeline.planning.layers import cut, decoder_layers, enough, kinds, representative
from pipeline.planning.states import Weight, ZeroSettings, weights_of
from pipeline.planning.tracing import Backward, Trace, trace


@dataclass(frozen=True)
class Row:
    """The texts of one packed row, in tokens: the user's, the reference texts behind them, and how many of the user's
    tokens are trained."""

    users: tuple[int, ...]
    references: tuple[int, ...]
    trained: int

    @property
    def tokens(self) -> int:
        """Of the whole row."""
        return sum(self.users) + sum(self.references)


@dataclass(frozen=True)
class Activations:
    """Bytes of one micro-batch on a rank, parameters left out."""

    saved: int  # kept by autograd when the backward pass begins
    peak: int  # alive at one time, forward and backward: activations, their gradients, a weight's whole gradient
    logits: int  # alive at one time while the output projection and the loss run, beyond what lived before


@dataclass(frozen=True)
class Subject:
    """A model and what a training step does with it.

    config: the transformers configuration. build: the model of a configuration on the meta device, ready to train.
    step: one micro-batch's forward and backward passes over a row, the latter by the function it is given.
    whole: the step names layers by number, so none may be left out.
    """

    config: Any
    build: Callable[[Any], nn.Module]
    step: Callable[[nn.Module, Row, Backward], None]
    whole: bool = False

    @cached_property
    def model(self) -> nn.Module:
        """All of it, on the meta device."""
        return self.build(self.config)

    @cached_property
    def weights(self) -> list[Weight]:
        """Its parameters."""
        return weights_of(self.model, self._layers[0], self.config.get_text_config())

    @cached_property
    def _layers(self) -> tuple[str, list[int]]:
        name, layers = decoder_layers(self.model, self.config.get_text_config())
        return name, kinds(layers)

    @cached_property
    def _cut(self) -> tuple[nn.Module, nn.ModuleList]:
        _, numbers = self._layers
        count = len(numbers) if self.whole else enough(numbers)
        if count == len(numbers):
            model = self.model
        else:
            model = self.build(cut(self.config, count))
        return model, decoder_layers(model, model.config.get_text_config())[1]  # type: ignore[union-attr, operator]

    @cached_property
    def _traces(self) -> dict[tuple[Row, bool], Trace]:
        return {}

    @cached_property
    def _gathers(self) -> dict[ZeroSettings, Gathers]:
        return {}

    def _trace(self, row: Row, efficient_linear: bool) -> Trace:
        """Errors: ValueError for a model one of whose operations does not run on the meta device."""
        model, layers = self._cut
        if (row, efficient_linear) not in self._traces:
            try:
                found = trace(
                    model, layers, lambda backward: self.step(model, row, backward), efficient_linear=efficient_linear
                )
            except RuntimeError as error:
                raise ValueError(
                    f"--model_name_or_path: a step of {self.config.model_type} cannot be traced on the meta "
                    f"device, so it is not planned: {str(error).splitlines()[0]}"
                ) from error
            self._traces[row, efficient_linear] = found
        return self._traces[row, efficient_linear]

    def activations(self, row: Row, efficient_linear: bool = True) -> Activations:
        """Of one micro-batch. efficient_linear: as `tracing.trace`."""
        found = self._trace(row, efficient_linear)
        _, numbers = self._layers
        count = len(found.layer_saved) + 1
        standing = representative(numbers, count)
        rest = [standing[kind] for kind in numbers[count:]]
        return Activations(
            saved=found.saved + sum(found.layer_saved[each] for each in rest),
            peak=found.peak + sum(found.layer_kept[each] for each in rest),
            logits=found.logits,
        )

    def gathers(self, row: Row, zero: ZeroSettings) -> Gathers:
        """Of one micro-batch; the same for every row."""
        if zero not in self._gathers:
            found = self._trace(row, zero.efficient_linear)
            name, numbers = self._layers
            events = extend(found.events, name, numbers, len(found.layer_saved) + 1)
            self._gathers[zero] = gathers(events, self.weights, zero)
        return self._gathers[zero]
