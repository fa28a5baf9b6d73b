"""A plan in words."""

from __future__ import annotations

from pipeline.planning.hardware import Cluster
from pipeline.planning.plan import Job, Plan
from pipeline.planning.recommend import WORTH, HpZ, Recommendation
from pipeline.planning.storage import DISK, PROCESS

MIB, GIB = 2**20, 2**30
Line = tuple[str, str]


def shown(size: float) -> str:
    """Bytes for people."""
    if size < 0.1 * GIB:
        return f"{size / MIB:.1f} MiB"
    return f"{size / GIB:.2f} GiB" if size < 100 * GIB else f"{size / GIB:,.0f} GiB"


def assumptions(cluster: Cluster) -> str:
    """What the predicted times rest on."""
    gpu, share = cluster.gpu, cluster.efficiency
    return (
        f"{gpu.name} ({gpu.source}): {gpu.memory / GIB:.0f} GiB, {gpu.flops / 1e12:.0f} TFLOP/s bf16 dense, "
        f"{gpu.in_node / 1e9:g} GB/s in a node, {gpu.between_nodes / 1e9:g} GB/s a GPU between nodes; assumed: "
        f"{share.compute:.0%} of the peak, {share.links:.0%} of the links and no latency, {share.reserve:.0%} of the "
        "memory for CUDA, NCCL and fragmentation"
    )


def parts(found: Plan) -> list[tuple[str, int]]:
    """The parts of a rank's memory on its device, in bytes; the peak is the states and what passes at the worst
    time."""
    held = found.states
    named = [
        ("parameters (shard)", held.parameters),
        ("small parameters, whole", held.whole_parameters),
        ("second shard (hpZ)", held.secondary),
        ("gradients (shard)", held.gradients),
        ("optimizer: fp32 copy, two moments (shard)", held.optimizer),
        ("reduce bucket", held.bucket),
        ("weights gathered at one time", found.gathers.live + found.gathers.copied),
        ("activations and gradients at one time", found.activations.peak),
        ("copy of a reduced bucket", found.reducing),
    ]
    return [(name, size) for name, size in named if size]


def describe(job: Job, found: Plan, references: int, advice: Recommendation, hpz: HpZ | None) -> str:
    """The plan of one setting. references: bytes of the saved activations that are the reference texts'."""
    lines = [
        (
            "prediction",
            f"{job.subject(job.checkpointing).config.name_or_path} on {found.ranks} GPUs ({job.cluster.nodes} x "
            f"{job.cluster.gpus_per_node}): {found.parameters:,} parameters, {found.trained:,} trained; "
            f"{'with' if job.checkpointing else 'without'} activation checkpointing",
        ),
        ("hardware", assumptions(job.cluster)),
        *_memory(job, found, references),
        *_communication(found),
        *_time(found),
        *_outside(found),
        *_links(found, hpz),
        ("recommended", _advice(advice)),
    ]
    return "\n".join(f"{name:<15} {text}" for name, text in lines)


def _memory(job: Job, found: Plan, references: int) -> list[Line]:
    row = job.row
    if found.fits:
        verdict = f"fits, {shown(found.usable - found.peak)} to spare of {shown(found.usable)}"
    else:
        verdict = f"does NOT fit, {shown(found.peak - found.usable)} too much for {shown(found.usable)}"
    saved = found.activations.saved
    return [
        (
            "micro-batch",
            f"{job.rows} rows of {job.tokens} tokens, {row.trained} of them trained, and {len(row.references)} "
            f"reference texts of {sum(row.references)} together; x {job.accumulation} accumulation x {found.ranks} "
            "ranks",
        ),
        *((("memory a GPU" if i == 0 else ""), f"{shown(n):>12}  {part}") for i, (part, n) in enumerate(parts(found))),
        ("", f"{shown(found.peak):>12}  peak: {verdict}"),
        ("", f"{shown(found.stepping):>12}  beside the states while the optimizer steps, without activations"),
        (
            "activations",
            f"{shown(saved)} saved for the backward pass, {references / max(1, saved):.1%} of it the references'; "
            f"{shown(found.activations.logits)} of logits at one time",
        ),
        ("largest layer", f"{shown(found.gathers.largest)} gathered: {found.gathers.largest_module or 'nothing'}"),
    ]


def _communication(found: Plan) -> list[Line]:
    carried = found.traffic
    inside = carried.forward_in_group + carried.backward_in_group
    weights = f"{shown(carried.forward + carried.backward)} of weights gathered over all ranks"
    groups = f" and {shown(inside)} in groups" if inside else ""
    return [("a step carries", f"{weights}{groups}, {shown(carried.reduced)} of gradients")]


def _time(found: Plan) -> list[Line]:
    time = found.time
    return [
        (
            "a step takes",
            f"{time.overlapped:.2f} s if collectives hide behind computing, {time.serial:.2f} s if they never do; "
            f"{found.user_tokens / time.overlapped:,.0f} user tokens/s",
        ),
        (
            "",
            f"computing {time.forward:.2f} + {time.backward:.2f} s, gathers {time.links.forward:.2f} + "
            f"{time.links.backward:.2f} s, gradients {time.links.reduced:.2f} s, optimizer {time.optimizer:.2f} s"
            + (f", host transfers {time.host:.2f} s" if time.host else ""),
        ),
    ]


def _outside(found: Plan) -> list[Line]:
    needs = found.storage
    return [
        (
            "host memory",
            f"{shown(needs.host_loading)} on rank 0's node while loading, {shown(needs.host_training)} on every node "
            f"in training; {shown(PROCESS)} a process assumed",
        ),
        (
            "checkpoint",
            f"{shown(needs.checkpoint)}; converted {shown(needs.converted)} in about "
            f"{needs.conversion_seconds:,.0f} s at {DISK / 1e9:g} GB/s",
        ),
    ]


def _links(found: Plan, hpz: HpZ | None) -> list[Line]:
    share = found.time.exposed / found.time.overlapped
    verdict = "dominate" if share > 0.5 else "hold the step up" if share > WORTH else "hide behind computing"
    lines = [("links", f"collectives {verdict}: {share:.0%} of the step waits for them at best")]
    if hpz is None:
        return lines
    return [
        *lines,
        (
            "",
            f"zero_hpz_partition_size {hpz.size}: {hpz.with_it.time.span} s a step with it, {hpz.without.time.span} s "
            f"without; it takes {shown(hpz.memory)}: {hpz.advice}",
        ),
    ]


def _advice(advice: Recommendation) -> str:
    if advice.plan is None:
        return "nothing fits, not even with offload and one row a micro-batch: use GPUs with more memory"
    text = (
        f"{', '.join(advice.changes) or 'what you asked for'}: peak {shown(advice.plan.peak)} of "
        f"{shown(advice.plan.usable)}, {advice.plan.time.overlapped:.2f} s a step"
    )
    if advice.nodes_instead is not None:
        text += f"; or {advice.nodes_instead} nodes with --gradient_checkpointing and without this offload"
    return text
