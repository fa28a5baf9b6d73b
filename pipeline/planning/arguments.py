"""The planner's own flags: what to plan for."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

from pipeline.config import Problems, nearest, out_of_range
from pipeline.planning.hardware import GPUS, Cluster, Efficiency, Gpu


@dataclass
class PlanArguments:
    """Nodes and GPUs, and what their rows look like."""

    nodes: int = field(default=1, metadata={"help": "Nodes. The report shows 1 to this many, doubling."})
    gpus_per_node: int = field(default=8, metadata={"help": "GPUs of a node, one rank each."})
    gpu: str = field(default="h100-80gb", metadata={"help": f"One of {', '.join(GPUS)}."})
    gpu_memory_gib: float | None = field(default=None, metadata={"help": "In place of --gpu's memory."})
    gpu_tflops: float | None = field(default=None, metadata={"help": "In place of --gpu's dense bf16 peak."})
    node_link_gbs: float | None = field(
        default=None, metadata={"help": "In place of --gpu's link in a node: GB/s in one direction."}
    )
    network_gbs: float | None = field(
        default=None, metadata={"help": "In place of --gpu's network port: GB/s in one direction for each GPU."}
    )
    mfu: float = field(
        default=Efficiency.compute, metadata={"help": "Assumed share of the peak that matrix products reach."}
    )
    trained_share: float = field(default=0.5, metadata={"help": "Share of the rows' tokens that are trained."})
    simulate: bool = field(
        default=False, metadata={"help": "Sweep 7B, 8B, 13B, 34B and 70B over --nodes: a table and two pictures."}
    )

    def __post_init__(self) -> None:
        problems = []
        if self.gpu not in GPUS:
            problems.append(
                f"--gpu {self.gpu} is unknown{nearest(self.gpu, GPUS, otherwise='')}; known: {', '.join(GPUS)}"
            )
        problems += out_of_range(self, ("nodes", "gpus_per_node"), 1)
        for name in ("gpu_memory_gib", "gpu_tflops", "node_link_gbs", "network_gbs"):
            if (value := getattr(self, name)) is not None and value <= 0:
                problems.append(f"--{name} {value}: give more than 0")
        for name in ("mfu", "trained_share"):
            if not 0 < getattr(self, name) <= 1:
                problems.append(f"--{name} {getattr(self, name)}: give a share above 0, up to 1")
        if problems:
            raise Problems(problems)

    def cluster(self) -> Cluster:
        """The cluster to plan for."""
        gpu: Gpu = GPUS[self.gpu]
        own = {
            "memory": None if self.gpu_memory_gib is None else int(self.gpu_memory_gib * 2**30),
            "flops": None if self.gpu_tflops is None else self.gpu_tflops * 1e12,
            "in_node": None if self.node_link_gbs is None else self.node_link_gbs * 1e9,
            "between_nodes": None if self.network_gbs is None else self.network_gbs * 1e9,
        }
        given = {name: value for name, value in own.items() if value is not None}
        if given:
            gpu = replace(gpu, **given, source=f"{gpu.source}; by flags: {', '.join(given)}")  # type: ignore[arg-type]
        return Cluster(gpu, self.nodes, self.gpus_per_node, Efficiency(compute=self.mfu))
