"""A sweep of model sizes over nodes: one table, and pictures of memory and step time."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from pipeline.planning.description import GIB, assumptions, shown
from pipeline.planning.plan import Job, Plan, plan
from pipeline.planning.recommend import HpZ, with_hpz
from pipeline.planning.report import as_json, over_node_counts, table, write_files
from pipeline.report.figures import COLOURS, GREY, GRID, MARKERS, new_figure, png


@dataclass(frozen=True)
class Point:
    """One size on one cluster."""

    job: Job
    plan: Plan
    hpz: HpZ | None


def simulate(jobs: Mapping[str, Job], out: Path | None) -> str:
    """Each job on 1 node to its own number, as a table; simulation.md, simulation.json and the pictures in `out`."""
    points = {
        name: [Point(each, plan(each), with_hpz(each)) for each in over_node_counts(job)] for name, job in jobs.items()
    }
    text = simulation_table(points)
    if out is not None:
        figures = {name: [as_json(point.job, point.plan) for point in each] for name, each in points.items()}
        content = {"simulation.md": text.encode(), "simulation.json": json.dumps(figures, indent=2).encode()}
        write_files(out, content | pictures(points))
    return text


def simulation_table(points: Mapping[str, Sequence[Point]]) -> str:
    """Markdown, which says that it is a prediction and what it rests on."""
    job = next(iter(points.values()))[0].job
    other = "without" if job.zero.hpz > 1 else "with"
    head = [
        "model", "nodes x GPUs", "states a GPU", "peak a GPU", "fits", "s/step", "user tokens/s", "waits for links",
        f"s/step {other} hpZ",
    ]  # fmt: skip
    rows = [head]
    for name, each in points.items():
        for point in each:
            found, cluster = point.plan, point.job.cluster
            time = found.time
            rows.append(
                [
                    name, f"{cluster.nodes} x {cluster.gpus_per_node}", shown(found.states.on_device),
                    shown(found.peak), "yes" if found.fits else "no", time.span,
                    f"{found.user_tokens / time.overlapped:,.0f}", f"{time.exposed / time.overlapped:.0%}",
                    _other(point, other),
                ]
            )  # fmt: skip
    trained = "full-parameter" if found.trained == found.parameters else "LoRA"
    setting = (
        f"Predicted by tools/plan.py, not measured. {trained}, AdamW, ZeRO-3, {job.rows} rows of {job.tokens} "
        f"tokens and {len(job.references)} reference texts ({sum(job.references)} tokens) a GPU, "
        f"{'with' if job.checkpointing else 'without'} activation checkpointing, {job.accumulation} accumulation. "
        "s/step: if collectives hide behind computing, to if they never do; waits: of the former. "
        f"{other.capitalize()} hpZ: zero_hpz_partition_size "
        f"{job.zero.hpz if job.zero.hpz > 1 else job.cluster.gpus_per_node}. {assumptions(job.cluster)}."
    )
    return f"{table(rows)}\n\n{setting}\n"


def _other(point: Point, other: str) -> str:
    hpz = point.hpz
    if hpz is None:
        return "-"
    found = hpz.without if other == "without" else hpz.with_it
    return found.time.span if found.fits else f"{found.time.span}, does not fit"


def pictures(points: Mapping[str, Sequence[Point]]) -> dict[str, bytes]:
    """memory.png and step_time.png: a line a size, over the number of GPUs; a filled mark where the run fits."""
    cluster = next(iter(points.values()))[0].job.cluster
    title = f"{cluster.gpus_per_node} x {cluster.gpu.name} a node (prediction)"
    memory = {name: [point.plan.peak / GIB for point in each] for name, each in points.items()}
    seconds = {name: [point.plan.time.overlapped for point in each] for name, each in points.items()}
    drawn = {}
    for name, values, label in (
        ("memory", memory, "peak memory of a GPU (GiB)"),
        ("step_time", seconds, "seconds a step, collectives hidden"),
    ):
        figure, axes = new_figure(6.4, 4.0)
        for i, (size, ys) in enumerate(values.items()):
            each = points[size]
            xs = [point.plan.ranks for point in each]
            axes.plot(xs, ys, color=COLOURS[i], linewidth=1.4, label=size)
            for x, y, point in zip(xs, ys, each, strict=True):
                face = COLOURS[i] if point.plan.fits else "white"
                axes.plot([x], [y], MARKERS[i], color=COLOURS[i], markerfacecolor=face, markersize=6)
        if name == "memory":
            usable = cluster.usable / GIB
            axes.axhline(usable, color=GREY, linestyle="--", linewidth=1)
            axes.annotate(
                "usable", (1, usable), xycoords=("axes fraction", "data"), ha="right", va="bottom", color=GREY
            )
        axes.set_xscale("log", base=2)
        axes.set_yscale("log", base=2)
        axes.yaxis.set_major_formatter("{x:g}")
        ranks = sorted({point.plan.ranks for each in points.values() for point in each})
        axes.set_xticks(ranks, [str(each) for each in ranks])
        axes.grid(color=GRID, linewidth=0.6)
        axes.set_xlabel("GPUs; hollow: does not fit")
        axes.set_ylabel(label)
        axes.set_title(title, fontsize=10)
        axes.legend(frameon=False)
        drawn[f"{name}.png"] = png(figure)
    return drawn
