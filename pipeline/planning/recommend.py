"""Which micro-batch, checkpointing and offload fit, and whether a second copy of the weights in a node would help."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

from pipeline.planning.plan import Job, Plan, plan
from pipeline.planning.states import states

MOST_NODES = 512
WORTH = 0.05  # of a step: less is not recommended for


@dataclass(frozen=True)
class Recommendation:
    """The fastest settings found that fit; `job` and `plan` are None where none does."""

    job: Job | None
    plan: Plan | None
    changes: list[str]  # what to set, in words of the flags and the ds_config
    nodes_instead: int | None  # where offload is recommended: how many nodes fit the run without it


def recommend(job: Job) -> Recommendation:
    """The settings with the shortest predicted step among those that fit and keep the global batch: rows a micro-batch
    against accumulation, checkpointing and offload as asked or turned on."""
    fitting: list[tuple[float, int, Job, Plan]] = []
    for number, candidate in enumerate(_candidates(job)):
        if fitting and candidate.zero != fitting[0][2].zero:
            break  # offload is for what does not fit otherwise
        if states(candidate.subject(candidate.checkpointing).weights, candidate.zero).on_device > job.cluster.usable:
            continue
        for rows in _divisors(job.rows * job.accumulation):
            sized = replace(candidate, rows=rows, accumulation=job.rows * job.accumulation // rows)
            found = plan(sized)
            if found.fits:
                fitting.append((found.time.overlapped, number, sized, found))
                break  # fewer rows cost as much computing and more collectives
    if not fitting:
        return Recommendation(None, None, [], None)
    _, _, best, found = min(fitting, key=lambda each: each[:2])
    return Recommendation(best, found, list(_changes(job, best)), None if best.zero == job.zero else _nodes(job))


def _candidates(job: Job) -> Iterator[Job]:
    offloads = [
        (job.zero.optimizer_on_host, job.zero.parameters_on_host),
        (True, job.zero.parameters_on_host),
        (True, True),
    ]
    for optimizer, parameters in dict.fromkeys(offloads):
        for checkpointing in dict.fromkeys((job.checkpointing, True)):
            zero = replace(job.zero, optimizer_on_host=optimizer, parameters_on_host=parameters)
            yield replace(job, checkpointing=checkpointing, zero=zero)


def _divisors(number: int) -> list[int]:
    return [each for each in range(number, 0, -1) if number % each == 0]


def _changes(job: Job, best: Job) -> Iterator[str]:
    if best.rows != job.rows:
        yield f"--per_device_train_batch_size {best.rows}"
        yield f"--gradient_accumulation_steps {best.accumulation}"
    if best.checkpointing and not job.checkpointing:
        yield "--gradient_checkpointing"
    for name in ("optimizer", "param"):
        field = "optimizer_on_host" if name == "optimizer" else "parameters_on_host"
        if getattr(best.zero, field) and not getattr(job.zero, field):
            yield f'ds_config zero_optimization.offload_{name}: {{"device": "cpu", "pin_memory": true}}'


def _nodes(job: Job) -> int | None:
    """The next power of two times the nodes that fits the run as it is, checkpointed and one row at a time."""
    small = replace(job, rows=1, accumulation=job.rows * job.accumulation, checkpointing=True)
    nodes = 2 * job.cluster.nodes
    while nodes <= MOST_NODES:
        if plan(small.on(nodes)).fits:
            return nodes
        nodes *= 2
    return None


@dataclass(frozen=True)
class HpZ:
    """A run with zero_hpz_partition_size (ZeRO++) beside the same run without it."""

    size: int
    with_it: Plan
    without: Plan

    @property
    def memory(self) -> int:
        """Bytes that it takes on a device."""
        return self.with_it.peak - self.without.peak

    @property
    def advice(self) -> str:
        """Whether to use it."""
        after, before = self.with_it.time, self.without.time
        if not self.with_it.fits:
            return "does not fit"
        if after.overlapped < (1 - WORTH) * before.overlapped:
            return "use it"
        hidden = after.serial < (1 - WORTH) * before.serial
        return "worth it only where collectives do not hide" if hidden else "not worth it"


def with_hpz(job: Job) -> HpZ | None:
    """A job with the second shard of the weights that it has, or else with one in each node, and without; None on one
    node."""
    if job.cluster.nodes == 1 or job.cluster.gpus_per_node == 1:
        return None
    size = job.zero.hpz if job.zero.hpz > 1 else job.cluster.gpus_per_node
    with_it, without = (plan(replace(job, zero=replace(job.zero, hpz=each))) for each in (size, 1))
    return HpZ(size, with_it, without)
