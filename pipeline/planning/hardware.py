"""What the vendor states about a GPU and its links, and what of it a training step reaches.

Stated figures are peaks. `Efficiency` holds the shares that this planner assumes of them; every report prints it.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import inf


@dataclass(frozen=True)
class Gpu:
    """One GPU in a node of its usual kind. Bandwidths are bytes per second in one direction for one GPU."""

    name: str
    memory: int  # bytes
    flops: float  # bf16 on tensor cores, dense
    hbm: float
    in_node: float  # to the GPUs of the same node
    between_nodes: float
    host: float  # to host memory
    source: str


# NVIDIA's data sheets of the H100, H200 and A100 (column SXM) and of the L40S. Their bf16 figures "with sparsity" are
# twice the dense ones, and they state NVLink and PCIe for both directions together: half of it is taken. A network
# port for each GPU: "DGX H100/H200 User Guide" (eight ConnectX-7, 400 Gbit/s), "DGX A100 User Guide" (eight
# ConnectX-6, 200 Gbit/s); with an L40S 100 Gbit/s is assumed. Memory is what PyTorch reports in its out-of-memory
# messages (79.11, 139.80, 79.15, 39.49 and 44.42 GiB), rounded down.
GPUS = {
    gpu.name: gpu
    for gpu in (
        Gpu("h100-80gb", 79 * 2**30, 989e12, 3350e9, 450e9, 50e9, 64e9, "data sheet, SXM; DGX H100"),
        Gpu("h200-141gb", 139 * 2**30, 989e12, 4800e9, 450e9, 50e9, 64e9, "data sheet, SXM; DGX H200"),
        Gpu("a100-80gb", 79 * 2**30, 312e12, 2039e9, 300e9, 25e9, 32e9, "data sheet, SXM; DGX A100"),
        Gpu("a100-40gb", 39 * 2**30, 312e12, 1555e9, 300e9, 25e9, 32e9, "data sheet, SXM; DGX A100"),
        Gpu("l40s-48gb", 44 * 2**30, 362e12, 864e9, 32e9, 12.5e9, 32e9, "data sheet; PCIe 4.0 x16, no NVLink"),
    )
}


@dataclass(frozen=True)
class Efficiency:
    """Assumed shares of the stated peaks.

    compute is near what the Llama 3 paper (arXiv 2407.21783, table 4) reports for H100s, 38 to 43 %; the others are
    guesses.
    """

    compute: float = 0.4  # of the bf16 peak, in matrix products and attention
    links: float = 0.7  # of a link's bandwidth, in collectives
    memory: float = 0.7  # of the HBM bandwidth, in the optimizer step
    reserve: float = 0.06  # of the memory: CUDA context, NCCL buffers, fragmentation


@dataclass(frozen=True)
class Cluster:
    """Nodes of equal GPUs."""

    gpu: Gpu
    nodes: int
    gpus_per_node: int
    efficiency: Efficiency = Efficiency()

    @property
    def ranks(self) -> int:
        """GPUs in all."""
        return self.nodes * self.gpus_per_node

    @property
    def usable(self) -> int:
        """Bytes of a GPU that tensors may take."""
        return int(self.gpu.memory * (1 - self.efficiency.reserve))


def unlisted(name: str, memory: int) -> Gpu:
    """A device of which only the memory is known: its times are nothing, and are not to be shown."""
    return Gpu(name, memory, inf, inf, inf, inf, inf, "the driver")


def of_device_name(name: str, memory: int) -> Gpu | None:
    """The table's GPU for what the driver calls it (NVIDIA H100 80GB HBM3) and its bytes; None if it is not there."""
    words = name.lower().replace("-", " ").split()
    near = [gpu for gpu in GPUS.values() if gpu.name.split("-")[0] in words]
    near = [gpu for gpu in near if abs(gpu.memory - memory) < 0.1 * memory]
    return near[0] if near and "pcie" not in words and "mig" not in words else None
