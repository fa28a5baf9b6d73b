"""An estimate of a step's time: floating-point operations at an assumed share of the GPU's peak, collectives at an
assumed share of the links, one beside the other.

Operations of a text of n tokens in its forward pass: two for each token and element of a matrix, and 2 H d n^2 for
causal attention with H heads of dimension d. The backward pass takes as many for the gradients of the inputs and, of
trained matrices, as many again for those of the weights; attention's takes 2.5 times its forward pass, because flash
attention recomputes (arXiv 2307.08691). Checkpointing adds a forward pass.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from pipeline.planning.activations import Row
from pipeline.planning.communication import Seconds
from pipeline.planning.hardware import Cluster
from pipeline.planning.states import Weight, ZeroSettings

ATTENTION_BACKWARD = 2.5
# Bytes that AdamW moves for an element: gradient 4 copied, scaled and read, state 12 read and written, weight 2.
OPTIMIZER_BYTES = 4 * 5 + 12 * 2 + 2
HOST_MEMORY = 200e9  # bytes a second that a node's host memory gives to AdamW on the CPU, assumed


@dataclass(frozen=True)
class Operations:
    """Floating-point operations of one micro-batch on one rank."""

    forward: float
    backward: float
    recomputed: float

    @property
    def useful(self) -> float:
        """Without what is computed twice."""
        return self.forward + self.backward


def operations(config: Any, weights: Sequence[Weight], row: Row, *, checkpointing: bool) -> Operations:
    """Operations over a packed row. config: of the (text) model."""
    inside = sum(each.numel * each.used for each in weights)
    trained = sum(each.numel * each.used for each in weights if each.trained)
    head = config.hidden_size * config.vocab_size
    head_trained = not any("lora_" in each.name for each in weights)
    dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    squares = sum(length**2 for length in (*row.users, *row.references))
    attention = 2.0 * config.num_hidden_layers * config.num_attention_heads * dim * squares
    layers = 2.0 * inside * row.tokens + attention
    logits = 2.0 * head * row.trained
    backward = 2.0 * (inside + trained) * row.tokens + ATTENTION_BACKWARD * attention + (1 + head_trained) * logits
    return Operations(layers + logits, backward, layers if checkpointing else 0.0)


@dataclass(frozen=True)
class StepTime:
    """Seconds of one optimizer step."""

    forward: float  # computing
    backward: float  # computing, with what is recomputed
    links: Seconds
    host: float  # transfers to and from host memory
    optimizer: float
    overlapped: float  # the step, if collectives cost nothing where they fit beside computing
    serial: float  # the step, if they never do

    @property
    def span(self) -> str:
        """Seconds at best to seconds at worst, for people."""
        return f"{self.overlapped:.2f} to {self.serial:.2f}"

    @property
    def exposed(self) -> float:
        """Seconds of `overlapped` in which computing waits for a link."""
        return self.overlapped - self.forward - self.backward - self.optimizer - self.host


def step_time(
    cluster: Cluster,
    work: Operations,
    links: Seconds,
    weights: Sequence[Weight],
    zero: ZeroSettings,
    gathered: int,
    accumulation: int,
) -> StepTime:
    """Time of an optimizer step of `accumulation` micro-batches. gathered: bytes of weights gathered in it."""
    gpu, share = cluster.gpu, cluster.efficiency
    rate = gpu.flops * share.compute
    forward = accumulation * work.forward / rate
    backward = accumulation * (work.backward + work.recomputed) / rate
    shard = sum(each.shard(zero.ranks) for each in weights if each.trained)
    optimizer = shard * OPTIMIZER_BYTES / (gpu.hbm * share.memory)
    host = 0.0
    if zero.parameters_on_host:
        host += gathered / zero.ranks / gpu.host
    if zero.optimizer_on_host:
        optimizer = shard * OPTIMIZER_BYTES * cluster.gpus_per_node / HOST_MEMORY
        host += shard * (accumulation * zero.gradient_width + 2) / gpu.host
    tail = links.small + host + optimizer
    overlapped = max(forward, links.forward) + max(backward, links.backward + links.reduced) + tail
    serial = forward + links.forward + backward + links.backward + links.reduced + tail
    return StepTime(forward, backward, links, host, optimizer, overlapped, serial)
