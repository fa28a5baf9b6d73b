"""A run's plan: what one rank holds, what the collectives carry, how long a step takes, and whether it fits."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

from pipeline.planning.activations import Activations, Row, Subject
from pipeline.planning.communication import Traffic, link_seconds, traffic
from pipeline.planning.gathering import Gathers
from pipeline.planning.hardware import Cluster
from pipeline.planning.states import States, ZeroSettings, reduce_bytes, states, step_bytes
from pipeline.planning.step_time import StepTime, operations, step_time
from pipeline.planning.storage import Storage, storage


@dataclass(frozen=True)
class Job:
    """A run to plan.

    subject: the model and its step, with or without activation checkpointing. tokens: of each of the user's rows;
    references: of each reference text of a micro-batch; trained_share: of the user's tokens.
    """

    subject: Callable[[bool], Subject]
    cluster: Cluster
    zero: ZeroSettings
    rows: int
    accumulation: int
    tokens: int
    references: tuple[int, ...]
    trained_share: float
    checkpointing: bool

    @property
    def row(self) -> Row:
        """The packed row of a micro-batch."""
        users = (self.tokens,) * self.rows
        return Row(users, self.references, max(1, int(sum(users) * self.trained_share)))

    def on(self, nodes: int) -> Job:
        """The same on another number of nodes."""
        cluster = replace(self.cluster, nodes=nodes)
        return replace(self, cluster=cluster, zero=replace(self.zero, ranks=cluster.ranks))


@dataclass(frozen=True)
class Plan:
    """Predicted figures of one rank, in bytes and seconds."""

    ranks: int
    states: States
    activations: Activations
    gathers: Gathers
    reducing: int  # copies of gradients on their way to the shards
    stepping: int  # the optimizer step's temporaries, when no activation is left
    peak: int
    usable: int
    traffic: Traffic
    time: StepTime
    storage: Storage
    user_tokens: int  # of an optimizer step, all ranks
    parameters: int
    trained: int

    @property
    def fits(self) -> bool:
        """Whether the peak stays below what a device can give."""
        return self.peak <= self.usable


def plan(job: Job) -> Plan:
    """Plan a run."""
    subject, zero, cluster, row = job.subject(job.checkpointing), job.zero, job.cluster, job.row
    weights = subject.weights
    held = states(weights, zero)
    activations, gathers = subject.activations(row, zero.efficient_linear), subject.gathers(row, zero)
    reducing, stepping = reduce_bytes(weights, zero), step_bytes(weights, zero)
    carried = traffic(weights, zero, gathers, job.accumulation)
    config = subject.config.get_text_config()
    time = step_time(
        cluster, operations(config, weights, row, checkpointing=job.checkpointing),
        link_seconds(carried, zero, cluster), weights, zero,
        (gathers.forward + gathers.backward) * job.accumulation, job.accumulation,
    )  # fmt: skip
    passing = gathers.live + gathers.copied + activations.peak + reducing
    return Plan(
        ranks=zero.ranks,
        states=held,
        activations=activations,
        gathers=gathers,
        reducing=reducing,
        stepping=stepping,
        peak=held.on_device + max(passing, stepping),
        usable=cluster.usable,
        traffic=carried,
        time=time,
        storage=storage(weights, zero, held, cluster.gpus_per_node),
        user_tokens=sum(row.users) * job.accumulation * zero.ranks,
        parameters=sum(weight.numel for weight in weights),
        trained=sum(weight.numel for weight in weights if weight.trained),
    )
