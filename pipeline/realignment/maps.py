"""Which linear maps of a model have a safety subspace: the seven projections of each decoder layer.

A fused projection (Phi-3's qkv_proj, gate_up_proj) is split by rows into the maps it holds, a subspace each. What is
left as it was tuned is listed with the reason.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from torch import nn
from transformers import PreTrainedModel

from pipeline.checkpoints.weights_out import TensorSpec

PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
_FUSED = {"qkv_proj": ("q_proj", "k_proj", "v_proj"), "gate_up_proj": ("gate_proj", "up_proj")}
_OTHER = "is not one of the projections q, k, v, o, gate, up, down"
_EXPERT = "is an expert's, which sees only the anchor tokens that are routed to it"


@dataclass(frozen=True)
class LinearMap:
    """Rows [start, stop) of the weight `tensor` [rows, columns] of a decoder layer.

    Attributes:
        module: name of the linear module within its layer.
        projection: one of PROJECTIONS.
    """

    tensor: str
    module: str
    layer: int
    projection: str
    start: int
    stop: int
    columns: int

    @property
    def key(self) -> str:
        """Unique in a model, and good as a file's name."""
        fused = self.module.rpartition(".")[2] != self.projection
        return f"{self.tensor}-{self.projection}" if fused else self.tensor


@dataclass(frozen=True)
class Skipped:
    """What is left as it was tuned, and why."""

    name: str
    reason: str


def decoder_layers(model: PreTrainedModel, where: Path) -> tuple[str, nn.ModuleList]:
    """Name and list of a model's decoder layers. Errors: ValueError if it has none under this name."""
    layers = getattr(model.base_model, "layers", None)
    names = [name for name, module in model.named_modules() if module is layers]
    if not isinstance(layers, nn.ModuleList) or not names:
        raise ValueError(
            f"{where}: a {model.config.model_type} model has no list of decoder layers; lssf reads Llama-like models"
        )
    return names[0], layers


def linear_maps(model: PreTrainedModel, where: Path) -> tuple[list[LinearMap], list[Skipped]]:
    """The maps of a model, layer by layer, and the other linear modules of its layers.

    model: on the meta device.

    Raises:
        ValueError: it has no decoder layers, or none of the projections is in them.
    """
    prefix, layers = decoder_layers(model, where)
    tied = {name for pair in model.all_tied_weights_keys.items() for name in pair}
    maps: list[LinearMap] = []
    skipped: list[Skipped] = []
    for index, layer in enumerate(layers):
        for module, linear in _linears(layer):
            tensor = f"{prefix}.{index}.{module}.weight"
            parts = _parts(module.rpartition(".")[2], linear, model)
            reason = _EXPERT if ".experts." in f".{module}" else "is tied to another tensor" if tensor in tied else ""
            if reason or not parts:
                skipped.append(Skipped(tensor, reason or _OTHER))
                continue
            start = 0
            for projection, rows in parts.items():
                maps.append(
                    LinearMap(tensor, module, index, projection, start, start + rows, int(linear.weight.shape[1]))
                )
                start += rows
    if not maps:
        raise ValueError(
            f"{where}: no decoder layer has a linear {', '.join(PROJECTIONS)}; lssf has nothing to work on"
        )
    return maps, skipped


def require_same(
    maps: Mapping[str, list[LinearMap]], found: Mapping[str, TensorSpec], folder: Path, flag: str
) -> None:
    """Holds a folder's tensors against the maps, by tensor.

    Raises:
        ValueError: a tensor is missing, of another shape, or not of a floating-point type, by name.
    """
    for tensor, parts in maps.items():
        shape = (parts[-1].stop, parts[0].columns)
        if tensor not in found:
            raise ValueError(
                f"--{flag} {folder}: has no tensor {tensor}; it is another model, or its files hold these weights "
                "under other names"
            )
        if found[tensor].shape != shape:
            raise ValueError(
                f"--{flag} {folder}: {tensor} has shape {list(found[tensor].shape)} instead of {list(shape)}"
            )
        if not found[tensor].dtype.is_floating_point:
            raise ValueError(f"--{flag} {folder}: {tensor} is of type {found[tensor].dtype} (a quantised model?)")


def by_tensor(maps: list[LinearMap]) -> dict[str, list[LinearMap]]:
    """The maps of each tensor, in the order of their rows."""
    found: dict[str, list[LinearMap]] = {}
    for each in maps:
        found.setdefault(each.tensor, []).append(each)
    return found


def _linears(layer: nn.Module) -> Iterator[tuple[str, nn.Linear]]:
    return ((name, module) for name, module in layer.named_modules() if isinstance(module, nn.Linear))


def _parts(name: str, linear: nn.Linear, model: PreTrainedModel) -> dict[str, int]:
    """Rows of each projection in a linear module; none if it is no projection."""
    rows = int(linear.weight.shape[0])
    if name in PROJECTIONS:
        return {name: rows}
    sizes = []
    if name == "gate_up_proj":
        sizes = [rows // 2, rows // 2]
    elif name == "qkv_proj":
        config = model.config
        dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        heads = config.num_attention_heads, config.num_key_value_heads, config.num_key_value_heads
        sizes = [dim * each for each in heads]
    return dict(zip(_FUSED[name], sizes, strict=True)) if sizes and sum(sizes) == rows else {}
