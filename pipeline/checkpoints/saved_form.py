"""What save_pretrained would write of a model: which tensors, and where each of them lies in the model's own.

transformers holds some models in another form than it saves them: a layer's experts are one tensor in memory and many
in a folder. Its own way back runs here once, on tensors without data that keep account of what is done to them. Nearly
always a written tensor is a range of one tensor of the model, and can be read without the rest of it.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from transformers import PreTrainedModel
from transformers.core_model_loading import revert_weight_conversion
from transformers.modeling_utils import remove_tied_weights_from_state_dict

from pipeline.checkpoints.weights_out import TensorSpec


@dataclass(frozen=True)
class SavedTensor:
    """One tensor as it is written.

    sources: the model's tensors that it is made of.
    start: element of its only source with which it begins and goes on without a gap; None if it is not such a range.
    """

    spec: TensorSpec
    sources: tuple[str, ...]
    start: int | None


def saved_form(model: PreTrainedModel, dtype: torch.dtype) -> list[SavedTensor]:
    """The tensors that save_pretrained would write of `model`, which is on the meta device, in its order.

    dtype: of the floating-point tensors, but those that the model's class keeps in fp32.
    """
    state = {
        name: tensor
        for name, tensor in model.state_dict().items()
        if name not in (model._keys_to_ignore_on_save or ())
    }
    state = remove_tied_weights_from_state_dict(state, model)
    traced = {name: _Traced.make(name, tensor) for name, tensor in state.items()}
    kept = [re.compile(each.replace("*", ".*")) for each in model._keep_in_fp32_modules_strict or ()]
    saved = []
    for name, tensor in revert_weight_conversion(model, dict(traced)).items():
        sources = tuple(sorted(tensor.sources))
        is_view = any(each is traced[sources[0]] for each in (tensor, tensor._base))
        in_fp32 = any(pattern.search(source) for pattern in kept for source in sources)
        written = tensor.dtype if not tensor.is_floating_point() else torch.float32 if in_fp32 else dtype
        spec = TensorSpec(name, tuple(tensor.shape), written)
        start = tensor.storage_offset() if is_view and tensor.is_contiguous() else None
        saved.append(SavedTensor(spec, sources, start))
    return saved


def compute(model: PreTrainedModel, name: str, sources: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """A written tensor that is no range, from its whole sources."""
    made: torch.Tensor = revert_weight_conversion(model, dict(sources))[name]
    return made


class _Traced(torch.Tensor):
    """A tensor without data that knows of which tensors of the model it was made. Asked to be contiguous it stays the
    view that it is, so that its offset and strides go on telling where its elements lie."""

    sources: frozenset[str]

    @classmethod
    def make(cls, name: str, like: torch.Tensor) -> _Traced:
        traced: _Traced = cls._make_subclass(cls, torch.empty(like.shape, dtype=like.dtype, device="meta"))
        traced.sources = frozenset([name])
        return traced

    @classmethod
    def __torch_function__(
        cls, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        if func is torch.Tensor.contiguous:
            return args[0]
        result = super().__torch_function__(func, types, args, kwargs or {})  # type: ignore[no-untyped-call]
        sources = frozenset[str]().union(*(each.sources for each in _traced((args, kwargs))))
        for each in _traced(result):
            each.sources = sources
        return result


def _traced(value: Any) -> Iterator[_Traced]:
    if isinstance(value, _Traced):
        yield value
    elif isinstance(value, Mapping):
        yield from _traced(tuple(value.values()))
    elif isinstance(value, list | tuple):
        for each in value:
            yield from _traced(each)
