"""The safe model run one decoder layer at a time: the weights of one layer are in memory, in fp32.

What a layer is called with (mask, positions, rotary angles) is what the model's own forward gives it: that forward is
run with layers that only record how they are called. Texts are run alone, so there is no padding.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn

from pipeline.checkpoints.model_folder import empty_model
from pipeline.checkpoints.weights_in import WeightsFolder
from pipeline.realignment.maps import decoder_layers

Call = tuple[tuple[Any, ...], dict[str, Any]]


class _Recorded(Exception):
    """Ends a forward pass whose layers have all been called."""


class LayerByLayer:
    """A model folder whose decoder layers are loaded one by one.

    Args:
        vocabulary: the token ids that will be run; only their embeddings are read.

    Raises:
        ValueError: not a model that can be run this way, or weights that are missing, of another shape, or not
            finite, by name.
    """

    def __init__(self, folder: Path, vocabulary: Sequence[int]) -> None:
        self._folder = folder
        self._weights = WeightsFolder(folder)
        self._model = empty_model(folder).float().eval()
        self._prefix, self._layers = decoder_layers(self._model, folder)
        self._rows = {token: row for row, token in enumerate(vocabulary)}
        self._embed = self._model.get_input_embeddings()
        self._materialise()
        self._read_embeddings(vocabulary)

    def __len__(self) -> int:
        return len(self._layers)

    @torch.inference_mode()
    def first_hidden(self, ids: Sequence[int]) -> torch.Tensor:
        """What goes into layer 0 [1, tokens, width], fp32."""
        return self._record(ids)[0]

    @torch.inference_mode()
    def run(self, index: int, ids: Sequence[int], hidden: torch.Tensor) -> torch.Tensor:
        """The output of the layer that `layer(index)` has loaded, for one text.

        hidden: its input [1, tokens, width].
        """
        arguments, keywords = self._record(ids)[1][index]
        out = self._layers[index](hidden, *arguments, **keywords)
        result: torch.Tensor = out if isinstance(out, torch.Tensor) else out[0]
        return result

    @contextmanager
    def layer(self, index: int) -> Iterator[nn.Module]:
        """Decoder layer `index` with its weights, which are released at the end."""
        layer = self._layers[index]
        empty = layer.state_dict()
        tensors = {name: self._load(f"{self._prefix}.{index}.{name}", each) for name, each in empty.items()}
        layer.load_state_dict(tensors, assign=True)
        tensors.clear()
        if lacking := [name for name, each in layer.named_buffers() if each.is_meta]:
            raise ValueError(f"{self._folder}: layer {index} computes with {lacking[0]}, which no file holds")
        try:
            yield layer
        finally:
            layer.load_state_dict(empty, assign=True)

    def _record(self, ids: Sequence[int]) -> tuple[torch.Tensor, list[Call]]:
        """What goes into layer 0, and how each layer is called beside that."""
        first: list[torch.Tensor] = []
        calls: list[Call] = []

        def record(hidden_states: torch.Tensor, *arguments: Any, **keywords: Any) -> torch.Tensor:
            first.append(hidden_states)
            calls.append((arguments, keywords))
            if len(calls) == len(self._layers):
                raise _Recorded
            return hidden_states

        for layer in self._layers:
            layer.forward = record
        try:
            embedded = self._embed(torch.tensor([[self._rows[token] for token in ids]]))
            self._model.base_model(inputs_embeds=embedded, use_cache=False)
        except _Recorded:
            return first[0], calls
        finally:
            for layer in self._layers:
                del layer.forward
        raise ValueError(f"{self._folder}: its forward pass leaves layers out, which is not supported here")

    def _materialise(self) -> None:
        """Computes the buffers outside the layers that no file holds: rotary frequencies, embedding scales."""
        self._embed.weight = nn.Parameter(torch.zeros(1, self._embed.weight.shape[1]), requires_grad=False)
        self._embed.padding_idx = None
        for name, module in self._model.named_modules():
            if name.startswith(f"{self._prefix}.") or not any(each.is_meta for each in module.buffers(recurse=False)):
                continue
            for key, buffer in module.named_buffers(recurse=False):
                setattr(module, key, torch.empty_like(buffer, device="cpu"))
            self._model._init_weights(module)

    def _read_embeddings(self, vocabulary: Sequence[int]) -> None:
        modules = {module: name for name, module in self._model.named_modules()}
        name = f"{modules[self._embed]}.weight"
        spec = self._weights.specs.get(name)
        if spec is None or len(spec.shape) != 2 or spec.shape[0] <= max(vocabulary):
            raise ValueError(f"{self._folder}: {name} does not hold the {max(vocabulary) + 1} tokens of its tokenizer")
        rows, width = spec.shape
        wanted = torch.tensor(vocabulary)
        found = torch.empty(len(vocabulary), width)
        block = max(2**22 // width, 1)
        starts = range(0, rows, block)
        for start, piece in zip(starts, self._weights.read(name, length=block * width), strict=True):
            here = (wanted >= start) & (wanted < start + block)
            found[here] = piece.view(-1, width)[wanted[here] - start].float()
        self._embed.weight = nn.Parameter(finite(found, name, self._folder), requires_grad=False)

    def _load(self, name: str, like: torch.Tensor) -> torch.Tensor:
        spec = self._weights.specs.get(name)
        if spec is None:
            raise ValueError(
                f"--safe_model {self._folder}: has no tensor {name}; its files hold these weights under other names "
                "(fused experts), which is not supported"
            )
        if spec.shape != tuple(like.shape):
            raise ValueError(
                f"--safe_model {self._folder}: {name} has shape {list(spec.shape)} instead of {list(like.shape)}"
            )
        if spec.dtype.is_floating_point != like.dtype.is_floating_point:
            raise ValueError(f"--safe_model {self._folder}: {name} is of type {spec.dtype} (a quantised model?)")
        return read_whole(self._weights.read, name, like.shape, like.dtype, self._folder)


def read_whole(
    read: Callable[[str], Iterator[torch.Tensor]], name: str, shape: Sequence[int], dtype: torch.dtype, folder: Path
) -> torch.Tensor:
    """A tensor in one piece of memory. Errors: ValueError as `finite`."""
    found = torch.empty(tuple(shape), dtype=dtype)
    flat, place = found.view(-1), 0
    for piece in read(name):
        flat[place : place + len(piece)] = piece
        place += len(piece)
    return finite(found, name, folder)


def finite(values: torch.Tensor, name: str, folder: Path) -> torch.Tensor:
    """The values. Errors: ValueError naming the tensor and its folder for NaN or infinity."""
    if values.is_floating_point() and not values.isfinite().all():
        raise ValueError(
            f"{folder}: {name} holds values that are not finite (NaN or infinity); the weights are broken"
        )
    return values
