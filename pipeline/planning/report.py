"""A plan as the report that is printed, and as JSON."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from pipeline.planning.activations import Row
from pipeline.planning.description import describe, shown
from pipeline.planning.plan import Job, Plan, plan
from pipeline.planning.recommend import recommend, with_hpz
from pipeline.report.files import write_bytes


def report(job: Job, out: Path | None) -> str:
    """A job's plan, its table over nodes and what is recommended; plan.json in `out`."""
    found = plan(job)
    row = job.row
    users = job.subject(job.checkpointing).activations(Row(row.users, (), row.trained), job.zero.efficient_linear)
    references = found.activations.saved - users.saved
    advice, hpz = recommend(job), with_hpz(job)
    if out is not None:
        content = as_json(job, found) | {
            "references_saved": references,
            "recommended": None if advice.job is None or advice.plan is None else as_json(advice.job, advice.plan),
            "changes": advice.changes,
            "hpz": None if hpz is None else asdict(hpz),
        }
        write_files(out, {"plan.json": json.dumps(content, indent=2).encode()})
    over_nodes = [(each, plan(each)) for each in over_node_counts(job)]
    return f"{describe(job, found, references, advice, hpz)}\n\n{nodes_table(over_nodes)}\n"


def over_node_counts(job: Job) -> list[Job]:
    """The job on 1, 2, 4 ... and its own number of nodes, where groups of hpZ are whole."""
    last = job.cluster.nodes
    counts = sorted({1 << power for power in range(last.bit_length())} | {last})
    return [job.on(nodes) for nodes in counts if nodes * job.cluster.gpus_per_node % job.zero.hpz == 0]


def write_files(out: Path, contents: Mapping[str, bytes]) -> None:
    """Into a folder, which is made. Errors: ValueError naming the flag where that is impossible."""
    try:
        out.mkdir(parents=True, exist_ok=True)
        for name, content in contents.items():
            write_bytes(out / name, content)
    except OSError as error:
        raise ValueError(f"--output_dir {out}: {error}: name a folder that can be written") from error


def as_json(job: Job, found: Plan) -> dict[str, Any]:
    """Every figure of a plan."""
    settings = asdict(job.cluster) | {
        "rows": job.rows, "accumulation": job.accumulation, "tokens": job.tokens, "references": list(job.references),
        "trained_share": job.trained_share, "gradient_checkpointing": job.checkpointing,
    }  # fmt: skip
    return {"prediction": True, "settings": settings, "zero": asdict(job.zero), "fits": found.fits} | asdict(found)


def nodes_table(plans: Sequence[tuple[Job, Plan]]) -> str:
    """Memory and time by the number of nodes."""
    head = ["nodes x GPUs", "states", "peak", "fits", "s/step", "s/step, no overlap", "user tokens/s"]
    rows = [
        [
            f"{job.cluster.nodes} x {job.cluster.gpus_per_node}", shown(found.states.on_device), shown(found.peak),
            "yes" if found.fits else f"no, {shown(found.peak - found.usable)} short", f"{found.time.overlapped:.2f}",
            f"{found.time.serial:.2f}", f"{found.user_tokens / found.time.overlapped:,.0f}",
        ]
        for job, found in plans
    ]  # fmt: skip
    return table([head, *rows])


def table(rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table; the first row is its head, numbers stand right."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = [
        [cell.rjust(n) if i else cell.ljust(n) for i, (cell, n) in enumerate(zip(row, widths, strict=True))]
        for row in rows
    ]
    lines.insert(1, ["-" * (n - 1) + (":" if i else "-") for i, n in enumerate(widths)])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
