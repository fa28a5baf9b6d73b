"""What ZeRO-3 holds on one rank between steps, exact in bytes: parameters, gradients, optimizer states, buffers.

Sharding as in ZeRO (arXiv 1910.02054, stage 3: all states divided by the ranks) and as the installed DeepSpeed does
it: every parameter is padded to a multiple of the ranks on its own (`Init._partition_param`); one small enough is
sharded too, and besides kept whole on every rank (`mark_persistent_parameters`); one buffer holds the gradient shards,
one fp32 copy and two moments the optimizer's, of trained parameters alone (`stage3.py`). hpZ of ZeRO++ (arXiv
2306.10209) keeps a second shard, of the parameter divided by the ranks of one group.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

WIDTHS = {"fp32": 4, "fp16": 2, "bf16": 2}
MASTER = MOMENTS = 4  # bytes an element: fp32


@dataclass(frozen=True)
class Weight:
    """One parameter of the model: elements, bytes an element, whether it is trained, and which share of its elements a
    token is multiplied with: 1 of a matrix, 0 of a vector or an embedding, of experts those that a token takes."""

    name: str
    numel: int
    width: int
    trained: bool
    used: float = 0.0

    def shard(self, ranks: int) -> int:
        """Elements that each of some ranks holds, padding included."""
        return math.ceil(self.numel / ranks)


def weights_of(model: nn.Module, layers: str, config: Any) -> list[Weight]:
    """The parameters of a model (on any device), tied ones once. layers: name of the list of decoder layers, the only
    ones that `used` is given for; config: of the (text) model."""
    experts = getattr(config, "num_local_experts", None) or getattr(config, "num_experts", None) or 1
    taken = (getattr(config, "num_experts_per_tok", None) or 1) / experts

    def used(name: str, dimensions: int) -> float:
        if dimensions < 2 or not name.startswith(f"{layers}."):
            return 0.0
        return taken if ".experts." in name else 1.0

    return [
        Weight(name, p.numel(), p.element_size(), p.requires_grad, used(name, p.dim()))
        for name, p in model.named_parameters()
    ]


@dataclass(frozen=True)
class ZeroSettings:
    """What of a resolved ds_config decides memory and communication. Sizes are elements."""

    ranks: int
    threshold: int
    model_threshold: int
    prefetch: int
    live: int
    reuse: int
    bucket: int  # 0 without contiguous_gradients, which allocates none
    sub_group: int
    hpz: int
    gradient_width: int  # bytes an element in the accumulation buffer
    reduce_width: int  # and in the reduction
    efficient_linear: bool
    parameters_on_host: bool
    optimizer_on_host: bool

    @classmethod
    def read(cls, ds_config: Mapping[str, Any], ranks: int) -> ZeroSettings:
        """From a resolved ds_config; keys that are not there have DeepSpeed's own defaults.

        Errors: ValueError for offload to NVMe, a partial offload or quantised collectives, which are not planned.
        """
        from deepspeed.runtime.zero.config import DeepSpeedZeroConfig

        zero = DeepSpeedZeroConfig(**ds_config["zero_optimization"])
        problems = [
            f"ds_config zero_optimization.{name}: {why}"
            for name, found, why in (
                ("zero_quantized_weights", zero.zero_quantized_weights, "quantised collectives are not planned"),
                ("zero_quantized_gradients", zero.zero_quantized_gradients, "quantised collectives are not planned"),
                (
                    "zero_quantized_nontrainable_weights",
                    zero.zero_quantized_nontrainable_weights,
                    "quantised weights are not planned",
                ),
                ("offload_param", _device(zero.offload_param) == "nvme", "offload to NVMe is not planned"),
                ("offload_optimizer", _device(zero.offload_optimizer) == "nvme", "offload to NVMe is not planned"),
                (
                    "offload_optimizer.ratio",
                    _device(zero.offload_optimizer) == "cpu" and zero.offload_optimizer.ratio < 1,
                    "a partial offload is not planned",
                ),
                (
                    f"zero_hpz_partition_size {zero.zero_hpz_partition_size}",
                    zero.zero_hpz_partition_size > 1 and ranks % zero.zero_hpz_partition_size != 0,
                    f"{ranks} ranks are not a multiple of it",
                ),
            )
            if found
        ]
        if problems:
            raise ValueError("\n".join(problems))
        half = bool(ds_config.get("bf16", {}).get("enabled"))
        computed = "bf16" if half else "fp32"
        accumulated = ds_config.get("data_types", {}).get("grad_accum_dtype") or computed
        return cls(
            ranks=ranks,
            threshold=zero.param_persistence_threshold,
            model_threshold=zero.model_persistence_threshold,
            prefetch=zero.prefetch_bucket_size,
            live=zero.max_live_parameters,
            reuse=zero.max_reuse_distance,
            bucket=zero.reduce_bucket_size if zero.contiguous_gradients else 0,
            sub_group=zero.sub_group_size,
            hpz=max(1, zero.zero_hpz_partition_size),
            gradient_width=WIDTHS[accumulated],
            reduce_width=WIDTHS[ds_config.get("communication_data_type") or computed],
            efficient_linear=zero.memory_efficient_linear,
            parameters_on_host=_device(zero.offload_param) == "cpu",
            optimizer_on_host=_device(zero.offload_optimizer) == "cpu",
        )


def _device(section: Any) -> str:
    return "none" if section is None else str(section.device)  # pydantic keeps the enum's value


def persistent(weights: Sequence[Weight], zero: ZeroSettings) -> list[Weight]:
    """The parameters that stay whole on every rank."""
    kept: list[Weight] = []
    total = 0
    for weight in weights:
        if weight.numel <= zero.threshold and total + weight.numel <= zero.model_threshold:
            kept.append(weight)
            total += weight.numel
    return kept


@dataclass(frozen=True)
class States:
    """Bytes on one rank between two steps, after the first step has made the moments."""

    parameters: int
    whole_parameters: int  # the small ones, besides their shard
    secondary: int  # hpZ
    gradients: int
    optimizer: int
    bucket: int
    on_host: int  # of parameters, gradients and optimizer, and the optimizer's own gradient copy; not on the device

    @property
    def on_device(self) -> int:
        """Bytes on the device."""
        parts = (self.parameters, self.whole_parameters, self.secondary, self.gradients, self.optimizer)
        return sum(parts) + self.bucket


def states(weights: Sequence[Weight], zero: ZeroSettings) -> States:
    """States of a rank; every rank holds the same, because shards are padded."""
    trained = sum(weight.shard(zero.ranks) for weight in weights if weight.trained)
    parameters = sum(weight.shard(zero.ranks) * weight.width for weight in weights)
    # A step drops the second shards of what it changed; a small weight is whole by then and gets none again.
    none_again = {weight.name for weight in persistent(weights, zero) if weight.trained}
    secondary = sum(
        w.shard(zero.ranks) * zero.ranks // zero.hpz * w.width for w in weights if w.name not in none_again
    )
    gradients, optimizer = trained * zero.gradient_width, trained * (MASTER + 2 * MOMENTS)
    shard_is_whole = zero.ranks == 1 and not zero.parameters_on_host
    on_host = parameters * zero.parameters_on_host
    if zero.optimizer_on_host:
        on_host += gradients + optimizer + trained * MASTER
    return States(
        parameters=0 if zero.parameters_on_host else parameters,
        whole_parameters=0 if shard_is_whole else sum(each.numel * each.width for each in persistent(weights, zero)),
        secondary=0 if zero.hpz == 1 or zero.parameters_on_host else secondary,
        gradients=0 if zero.optimizer_on_host else gradients,
        optimizer=0 if zero.optimizer_on_host else optimizer,
        bucket=zero.bucket * zero.reduce_width,
        on_host=on_host + (secondary if zero.hpz > 1 and zero.parameters_on_host else 0),
    )


def step_bytes(weights: Sequence[Weight], zero: ZeroSettings) -> int:
    """Bytes that the optimizer step takes for a moment, on the device, beyond the states.

    DeepSpeed flattens the gradients of a sub-group into a new fp32 tensor (`_prepare_fp32_grad_for_sub_group`), and
    torch's AdamW takes the square root of the second moment into another (`_multi_tensor_adamw`).
    """
    if zero.optimizer_on_host:
        return 0
    trained = [weight.shard(zero.ranks) for weight in weights if weight.trained]
    group = min(sum(trained), zero.sub_group + max(trained, default=0))
    return group * (MASTER + MOMENTS)


def reduce_bytes(weights: Sequence[Weight], zero: ZeroSettings) -> int:
    """Bytes that reducing gradients takes at most for a moment, beside the gradients themselves: a copy in the order
    of the ranks of a full bucket, or of a larger gradient that needs padding (`reduce_scatter_coalesced`)."""
    trained = [weight for weight in weights if weight.trained]
    bucket = min(zero.bucket, sum(weight.numel for weight in trained))
    padded = [weight.numel for weight in trained if weight.numel % zero.ranks]
    return max([bucket, *padded]) * zero.reduce_width if zero.ranks > 1 else 0
