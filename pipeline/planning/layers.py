"""The decoder layers of a model: which are alike, and how few of them show every kind."""

from __future__ import annotations

import copy
from typing import Any

from torch import nn


def decoder_layers(model: nn.Module, config: Any) -> tuple[str, nn.ModuleList]:
    """The list of decoder layers and its name in `model`. config: of the (text) model.

    Errors: ValueError for a model that has no such list.
    """
    for name, module in model.named_modules():
        if isinstance(module, nn.ModuleList) and len(module) == config.num_hidden_layers:
            return name, module
    raise ValueError(f"{config.model_type} has no list of {config.num_hidden_layers} decoder layers to plan with")


def kinds(layers: nn.ModuleList) -> list[int]:
    """A number for each layer, the same for layers of equal modules, weights and windows."""
    seen: dict[Any, int] = {}
    return [seen.setdefault(_form(layer), len(seen)) for layer in layers]


def _form(layer: nn.Module) -> Any:
    modules = tuple(
        (type(each).__name__, *(f"{name}={value}" for name, value in vars(each).items() if _counts(name, value)))
        for each in layer.modules()
    )
    return modules, tuple((name, p.shape, p.requires_grad) for name, p in layer.named_parameters())


def _counts(name: str, value: Any) -> bool:
    """Whether an attribute says how a module computes: a window, a switch, but not its number in the model."""
    return isinstance(value, bool | int | float | str) and not name.startswith("_") and not name.endswith("_idx")


def enough(numbers: list[int]) -> int:
    """Layers from the first on in which every kind stands between two others: the first keeps what all layers share,
    and what a layer leaves is known when the next one begins."""
    first_inside = [numbers.index(kind, 1) for kind in set(numbers[1:])]
    return min(len(numbers), 2 + max(first_inside, default=1))


def representative(numbers: list[int], traced: int) -> dict[int, int]:
    """The traced layer that stands for each kind that has layers behind the traced ones."""
    return {kind: max(i for i in range(1, traced - 1) if numbers[i] == kind) for kind in set(numbers[traced:])}


def cut(config: Any, layers: int) -> Any:
    """The configuration with its first layers alone."""
    config = copy.deepcopy(config)
    text = config.get_text_config()
    count = text.num_hidden_layers
    text.num_hidden_layers = layers
    for name, value in vars(text).items():
        if isinstance(value, list) and len(value) == count:
            setattr(text, name, value[:layers])
    return config
