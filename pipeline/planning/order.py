"""In which order modules ask for their weights and give them back, as ZeRO-3's hooks on them would see it."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Event:
    """A module asks for its weights, or gives them back.

    weights: names of its own. borrowed: of other modules' weights that it reads before their turn, as a LoRA layer
    reads the dtype of its first matrix. forward: for its forward pass, which may be recomputed. backward: while the
    backward pass runs.
    """

    module: str
    weights: Sequence[str]
    borrowed: Sequence[str]
    fetch: bool
    forward: bool
    backward: bool


class Order:
    """The events of a model's passes."""

    def __init__(self, model: nn.Module) -> None:
        self.events: list[Event] = []
        self.backward = False  # set by who runs the backward pass
        self._names = {module: name for name, module in model.named_modules()}
        self._weights = {id(parameter): name for name, parameter in model.named_parameters()}
        self._owned = {
            name: [self._weights[id(p)] for p in module.parameters(recurse=False)]
            for module, name in self._names.items()
        }
        self._borrowed: dict[str, list[str]] = {name: [] for name in self._owned}  # complete behind the forward pass
        self._running: list[str] = []  # modules in their forward pass

    @contextmanager
    def watched(self) -> Iterator[None]:
        """While this is open, events are noted."""
        with ExitStack() as stack:
            for module, name in self._names.items():
                stack.callback(_Hooks(module, self._note).remove)
                stack.callback(setattr, module, "_parameters", module._parameters)
                module._parameters = _Watched(module._parameters, functools.partial(self._read, name))
            yield

    def _note(self, module: nn.Module, fetch: bool, forward: bool) -> None:
        name = self._names[module]
        self.events.append(Event(name, self._owned[name], self._borrowed[name], fetch, forward, self.backward))
        if forward and not self.backward:  # what is recomputed may end early, and reads nothing else
            if fetch:
                self._running.append(name)
            else:
                self._running.pop()

    def _read(self, owner: str, parameter: Tensor) -> None:
        if self._running and owner not in self._running and not self.backward:
            borrowed, name = self._borrowed[self._running[-1]], self._weights[id(parameter)]
            if name not in borrowed:
                borrowed.append(name)


class _Watched(dict[str, Any]):
    """A module's parameters; says when one is read."""

    def __init__(self, parameters: dict[str, Any], read: Callable[[Tensor], None]) -> None:
        super().__init__(parameters)
        self._read = read

    def __getitem__(self, name: str) -> Any:
        parameter = super().__getitem__(name)
        if parameter is not None:
            self._read(parameter)
        return parameter


class _Hooks:
    """The hooks that ZeRO-3 puts on a module (`DeepSpeedZeRoOffload._register_deepspeed_module`), which say when it
    asks for its weights and when it gives them back."""

    def __init__(self, module: nn.Module, event: Callable[[nn.Module, bool, bool], None]) -> None:
        from deepspeed.runtime.zero.utils import apply_to_tensors_only

        waiting = 0

        class BeforeBackward(torch.autograd.Function):
            @staticmethod
            def forward(ctx: Any, output: Tensor) -> Tensor:
                return output.detach()

            @staticmethod
            def backward(ctx: Any, *grads: Tensor) -> Any:
                event(module, True, False)
                return grads

        class AfterBackward(torch.autograd.Function):
            @staticmethod
            def forward(ctx: Any, taken: Tensor) -> Tensor:
                nonlocal waiting
                waiting += taken.requires_grad
                return taken.detach()

            @staticmethod
            def backward(ctx: Any, *grads: Tensor) -> Any:
                nonlocal waiting
                waiting -= 1
                if waiting == 0:
                    event(module, False, False)
                return grads

        def begin(*_: Any) -> None:
            event(module, True, True)

        def take(_: nn.Module, inputs: Any) -> Any:
            nonlocal waiting
            waiting = 0
            return apply_to_tensors_only(AfterBackward.apply, inputs)

        def end(*_: Any) -> None:
            event(module, False, True)

        def give(_: nn.Module, inputs: Any, output: Any) -> Any:
            return apply_to_tensors_only(BeforeBackward.apply, output)

        self._handles = [
            module.register_forward_pre_hook(begin),
            module.register_forward_hook(end),
            module.register_forward_hook(give),
            module.register_forward_pre_hook(take),
        ]

    def remove(self) -> None:
        for handle in self._handles:
            handle.remove()
