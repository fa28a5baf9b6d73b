"""What the collectives of an optimizer step carry, and how long the links of a cluster take for it.

ZeRO-3 gathers every weight for the forward pass and again for the backward pass, and reduces every gradient to its
shards (ZeRO, arXiv 1910.02054, section 7: 1.5 times the volume of plain data parallelism). With hpZ (ZeRO++, arXiv
2306.10209) a weight that an optimizer step has changed is gathered from all ranks once, and then from the group that
holds a second copy; a frozen one never changes, so it is never gathered from all ranks again. The replay
(`gathering.py`) says what of this the prefetcher saves by keeping weights.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from pipeline.planning.gathering import Gathers
from pipeline.planning.hardware import Cluster
from pipeline.planning.states import Weight, ZeroSettings, persistent


@dataclass(frozen=True)
class Traffic:
    """Bytes of whole tensors in the collectives of one optimizer step; a rank receives all but its own share."""

    forward: int  # gathered weights, from all ranks
    backward: int
    forward_in_group: int  # the same, from the hpZ group
    backward_in_group: int
    reduced: int  # gradients
    small: int  # the small weights, which are gathered once behind the optimizer's step

    @property
    def everywhere(self) -> int:
        """Bytes of the collectives over all ranks."""
        return self.forward + self.backward + self.reduced + self.small


def traffic(weights: Sequence[Weight], zero: ZeroSettings, found: Gathers, accumulation: int) -> Traffic:
    """Collectives of one optimizer step of `accumulation` micro-batches."""
    if zero.ranks == 1:
        return Traffic(0, 0, 0, 0, 0, 0)

    def whole(weight: Weight) -> int:
        return weight.shard(zero.ranks) * zero.ranks

    reduced = accumulation * sum(whole(each) * zero.reduce_width for each in weights if each.trained)
    small = sum(whole(each) * each.width for each in persistent(weights, zero))
    forward, backward = accumulation * found.forward, accumulation * found.backward
    if zero.hpz == 1:
        return Traffic(forward, backward, 0, 0, reduced, small)
    return Traffic(found.changed, 0, forward - found.changed, backward, reduced, small)


@dataclass(frozen=True)
class Seconds:
    """What the collectives of one optimizer step take, with nothing beside them."""

    forward: float
    backward: float
    reduced: float
    small: float

    @property
    def total(self) -> float:
        """All of them."""
        return self.forward + self.backward + self.reduced + self.small


def link_seconds(carried: Traffic, zero: ZeroSettings, cluster: Cluster) -> Seconds:
    """Time of the collectives on a cluster."""

    def everywhere(size: int) -> float:
        return collective_seconds(size, cluster, cluster.ranks)

    def group(size: int) -> float:
        return collective_seconds(size, cluster, zero.hpz)

    return Seconds(
        forward=everywhere(carried.forward) + group(carried.forward_in_group),
        backward=everywhere(carried.backward) + group(carried.backward_in_group),
        reduced=everywhere(carried.reduced),
        small=everywhere(carried.small),
    )


def collective_seconds(size: int, cluster: Cluster, ranks: int) -> float:
    """An all-gather or reduce-scatter of `size` bytes (the whole tensor) over neighbouring ranks.

    Bandwidth alone: every GPU takes in what it lacks from its node's links, and every node what it lacks through the
    network ports of all its GPUs together, as rings and trees over all ports do.
    """
    share = cluster.efficiency.links
    seconds = size * (1 - 1 / ranks) / (cluster.gpu.in_node * share)
    if ranks > cluster.gpus_per_node:
        nodes = ranks / cluster.gpus_per_node
        ports = cluster.gpus_per_node * cluster.gpu.between_nodes
        seconds = max(seconds, size * (1 - 1 / nodes) / (ports * share))
    return seconds
