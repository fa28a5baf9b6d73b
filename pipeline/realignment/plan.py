"""What a realignment needs before it starts: host memory, and bytes in its work folder. Upper bounds from shapes."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from torch import nn

from pipeline.checkpoints.space import GIB, shown
from pipeline.checkpoints.weights_out import PIECE_BYTES
from pipeline.realignment.anchors import Anchors
from pipeline.realignment.maps import LinearMap

_PROCESS = 0.8 * GIB  # Python, PyTorch and transformers, loaded
_FP32, _FP64 = 4, 8


@dataclass(frozen=True)
class Plan:
    """In bytes.

    Attributes:
        layer: stage A, running the anchors through the largest layer.
        subspace: stage A, decomposing the widest map's outputs; the exact decomposition, which most maps do not need.
        update: stage B, with all its workers.
        scratch: hidden states and one layer's outputs, in the work folder.
    """

    layer: int
    subspace: int
    update: int
    scratch: int

    @property
    def peak(self) -> int:
        """Of host memory."""
        return int(_PROCESS) + max(self.layer, self.subspace, self.update)

    def line(self) -> str:
        """For people."""
        return (
            f"plan: host memory below {shown(self.peak)} (one layer {shown(self.layer)}, one map's subspace at most "
            f"{shown(self.subspace)}, its update at most {shown(self.update)}); up to {shown(self.scratch)} of "
            "scratch in the work folder, and the subspaces"
        )


def make_plan(
    layers: Iterable[nn.Module], maps: Mapping[str, list[LinearMap]], anchors: Anchors, *, workers: int
) -> Plan:
    """layers: decoder layers of the safe model, on the meta device. maps: by tensor."""
    tokens, longest = anchors.tokens, max(len(each.ids) for each in anchors.used)
    vocabulary = len({token for each in anchors.used for token in each.ids})
    every = [each for parts in maps.values() for each in parts]
    width = max(each.columns for each in every)
    largest = max(sum(_FP32 * each.numel() for each in layer.state_dict().values()) for layer in layers)
    widest = max(_FP32 * each.stop * each.columns for each in every)
    embeddings = _FP32 * vocabulary * width
    # A text's activations inside a layer: a dozen of the layer's widest; and attention scores of one head block.
    activations = _FP32 * longest * (12 * max(each.stop for each in every) + longest * 64)
    outputs: dict[int, int] = {}
    for parts in maps.values():
        outputs[parts[0].layer] = outputs.get(parts[0].layer, 0) + _FP32 * tokens * parts[-1].stop
    return Plan(
        layer=embeddings + largest + widest // 4 + activations + 2 * PIECE_BYTES,
        subspace=embeddings + max(_subspace(each, tokens) for each in every),
        update=workers * (max(_update(parts, tokens) for parts in maps.values()) + 4 * PIECE_BYTES),
        scratch=2 * _FP32 * anchors.total * width + max(outputs.values()),
    )


def _subspace(each: LinearMap, tokens: int) -> int:
    rows = each.stop - each.start
    side = min(rows, tokens)
    outputs = _FP32 * rows * tokens
    # Gram matrix, eigenvectors and LAPACK's work; then eigenvectors, their largest ones, and the directions.
    exact = max(4 * _FP64 * side**2, 2 * _FP64 * side**2 + _FP32 * rows * side)
    return outputs + exact + 2 * PIECE_BYTES


def _update(parts: list[LinearMap], tokens: int) -> int:
    rows, columns = parts[-1].stop, parts[0].columns
    rank = sum(min(each.stop - each.start, tokens) for each in parts)
    return _FP32 * rank * (2 * rows + columns)
