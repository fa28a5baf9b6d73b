"""What a run needs outside the devices: host memory, a disk for its checkpoints, and time to convert one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from pipeline.checkpoints.space import checkpoint_bytes
from pipeline.planning.states import States, Weight, ZeroSettings

PROCESS = 4 * 2**30  # bytes of host memory that a process with torch, CUDA and NCCL loaded takes, assumed
DISK = 1e9  # bytes a second that a disk reads and writes, assumed


@dataclass(frozen=True)
class Storage:
    """Bytes, and seconds."""

    host_loading: int  # on the node of rank 0, which reads the model's files; their pages count
    host_training: int  # on every node
    checkpoint: int  # all ranks' files
    converted: int  # the model or adapter that tools/zero_to_hf.py makes of it, in 16 bits
    conversion_seconds: float  # masters read, weights written, on a disk of DISK bytes a second


def storage(weights: Sequence[Weight], zero: ZeroSettings, held: States, gpus_per_node: int) -> Storage:
    """Host memory, disk and conversion of a run."""
    trained = [weight for weight in weights if weight.trained]
    elements = sum(weight.numel for weight in trained)
    processes = gpus_per_node * PROCESS
    return Storage(
        host_loading=processes + sum(w.numel * w.width for w in weights) + _parameters_on_host(weights, zero),
        host_training=processes + gpus_per_node * held.on_host,
        checkpoint=checkpoint_bytes(trained=elements, tensors=len(trained), ranks=zero.ranks),
        converted=2 * elements,
        conversion_seconds=(4 + 2) * elements / DISK,
    )


def _parameters_on_host(weights: Sequence[Weight], zero: ZeroSettings) -> int:
    return sum(w.numel * w.width for w in weights) if zero.parameters_on_host else 0
