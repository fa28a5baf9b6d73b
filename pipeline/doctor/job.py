"""The doctor as one process a rank: who is here, what each node finds, the collectives, one verdict for all ranks."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import asdict
from typing import Any

from pipeline.doctor import collective, disk
from pipeline.doctor.compare import Report, compare
from pipeline.doctor.finding import FAILED, OK, Finding, examine
from pipeline.doctor.machine import Options, examine_rank, node_name
from pipeline.doctor.report import Row, job_lines, ready, written
from pipeline.doctor.roll import GRACE, NoMeeting, Place, Roll
from pipeline.slurm_job import expand


def examine_job(here: Place, options: Options) -> int:
    """This rank's part, and on rank 0 the report; the exit code, the same on every rank that took part to the end.

    A rank that cannot take part says so itself, with its node: rank 0 may never hear of it.
    """
    try:
        if here.rank:
            return _take_part(Roll(here, options.timeout), options)
        leader = Roll(here, options.timeout, serve=True)
        # A thread of its own, so that rank 0 names itself when a check of its own hangs.
        part = threading.Thread(target=lambda: _take_part(Roll(here, options.timeout), options), daemon=True)
        part.start()
        lead = _Leader(leader, options)
        rows = lead.rows()
    except NoMeeting as error:
        print(f"error: rank {here.rank} ({node_name()}): {error}", flush=True)
        if here.rank == 0:
            written(options.json, [Row(node_name(), 0, Finding("meeting", FAILED, str(error)))])
        return 1
    print("\n".join(job_lines(rows)), flush=True)
    # Before the verdict, for launchers end all ranks with the first that exits.
    code = 0 if written(options.json, rows) and ready(rows) else 1
    leader.announce("verdict", code)
    leader.gather("bye", lead.alive, GRACE)
    return code


def _take_part(roll: Roll, options: Options) -> int:
    """Register, examine, join the collectives, hear the verdict. Errors: NoMeeting."""
    here, patience = roll.here, options.timeout + GRACE
    roll.tell("here", node_name())
    go = roll.listen("go", patience)
    if go is not None:
        clock = time.time()  # all ranks at once, for they all waited
        node_ranks = go["nodes"].count(node_name())

        def starting(name: str) -> None:
            roll.tell("at", name)

        findings, device = examine_rank(options, here.local_rank, node_ranks, starting)
        if here.local_rank == 0 and go["token"]:
            checks = [("shared output_dir", lambda: disk.shared(options.output_dir, go["token"]))]
            findings += examine(checks, starting)
        said = {"node": node_name(), "clock": clock, "device": device, "findings": [asdict(each) for each in findings]}
        roll.tell("report", said)
        plan = roll.listen("plan", patience)
        if plan is not None:
            trial = collective.run_rank(collective.Plan(**plan), here.rank, device)
            roll.tell("trial", asdict(trial))
    code = roll.listen("verdict", 2 * patience)
    roll.tell("bye", True)
    return int(code)


class _Leader:
    """What rank 0 does between the steps that all ranks take."""

    def __init__(self, roll: Roll, options: Options) -> None:
        self.roll, self.options = roll, options
        self.ranks = list(range(roll.here.size))
        self.alive: Sequence[int] = []  # ranks that took part to the end, and are told the verdict

    def rows(self) -> list[Row]:
        """Lead through the steps as far as they go; every row of the report."""
        arrived = self.roll.gather("here", self.ranks, self.options.timeout)
        if len(arrived) < len(self.ranks):
            self.alive = list(arrived)
            self.roll.announce("go", None)
            return self._missing(arrived)
        nodes = [arrived[rank] for rank in self.ranks]
        print(f"{len(self.ranks)} ranks on {len(set(nodes))} nodes are here, and examine themselves", flush=True)
        with ExitStack() as until_all_have_looked:
            try:
                token = until_all_have_looked.enter_context(disk.token(self.options.output_dir))
            except OSError:
                token = None  # the check of output_dir says why
            self.roll.announce("go", {"nodes": nodes, "token": token})
            said = self.roll.gather("report", self.ranks, self.options.timeout)
        self.alive = list(said)
        reports = [
            Report(rank, each["node"], [Finding(**finding) for finding in each["findings"]], each["clock"])
            for rank, each in sorted(said.items())
        ]
        rows = [Row(report.node, report.rank, finding) for report in reports for finding in report.findings]
        rows += [Row(node, None, finding) for node, finding in compare(reports)]
        if len(reports) < len(self.ranks):
            self.roll.announce("plan", None)
            return rows + [self._silent(rank, nodes[rank]) for rank in self.ranks if rank not in said]
        devices = [said[rank]["device"] for rank in self.ranks]
        return rows + _without_device(nodes, devices) + self._collectives(nodes, devices)

    def _missing(self, arrived: dict[int, str]) -> list[Row]:
        """Rows about ranks that never came, with the nodes that nobody came from where Slurm tells them."""
        here = {node: [rank for rank in arrived if arrived[rank] == node] for node in dict.fromkeys(arrived.values())}
        job = os.environ.get("SLURM_STEP_NODELIST") or os.environ.get("SLURM_JOB_NODELIST") or ""
        silent = [node for node in expand(job) if node not in here]
        rows = [Row(node, ranks[0], Finding("arrived", OK, f"ranks {_short(ranks)}")) for node, ranks in here.items()]
        absent = _short([rank for rank in self.ranks if rank not in arrived])
        found = f"rank {absent} of {len(self.ranks)} never came, in {self.options.timeout:g} s"
        remedy = "look at that rank's own output, and at its node; --timeout waits longer"
        if silent:
            return rows + [Row(node, None, Finding("arrived", FAILED, f"nobody: {found}", remedy)) for node in silent]
        return [*rows, Row("", None, Finding("arrived", FAILED, found, remedy))]

    def _silent(self, rank: int, node: str) -> Row:
        """A rank that came and then said nothing more."""
        at = self.roll.heard("at", rank) or "the start"
        found = f"rank {rank} ended, hangs or is slow in the check of {at}"
        remedy = "look at that rank's own output, and at its node; --timeout waits longer"
        return Row(node, rank, Finding(str(at), FAILED, found, remedy))

    def _collectives(self, nodes: Sequence[str], devices: Sequence[str]) -> list[Row]:
        """All-reduce and exchanges over all ranks: NCCL where each has a device of its own."""
        backend = "nccl" if all(device != "cpu" for device in devices) else "gloo"
        amount = collective.NCCL_BYTES if backend == "nccl" else collective.GLOO_BYTES
        here, count = self.roll.here, len(self.ranks)
        distances = collective.shifts(count, _block(nodes))
        plan = collective.Plan(
            "job", backend, count, amount, here.host, here.port, False, distances, self.options.timeout
        )
        self.roll.announce("plan", asdict(plan))
        said: dict[int, Any] = self.roll.gather("trial", self.ranks, self.options.timeout + GRACE)
        nothing = collective.Trial({}, "start", "said nothing")
        trials = {rank: collective.Trial(**said[rank]) if rank in said else nothing for rank in self.ranks}
        names = {rank: f"rank {rank} of {nodes[rank]}" for rank in self.ranks}
        return [Row(nodes[rank], rank, finding) for rank, finding in collective.judge(backend, trials, names)]


def _without_device(nodes: Sequence[str], devices: Sequence[str]) -> list[Row]:
    """Ranks that would train on the CPU while others have a GPU."""
    remedy = "the rows of its node say why; or other ranks should not see GPUs either"
    return [
        Row(nodes[rank], rank, Finding("devices", FAILED, f"rank {rank} has none that works, others have", remedy))
        for rank, device in enumerate(devices)
        if device == "cpu" and set(devices) != {"cpu"}
    ]


def _block(nodes: Sequence[str]) -> int:
    """Ranks a node where all have the same number and follow each other, else 0."""
    first = nodes.count(nodes[0])
    blocks = [nodes[start : start + first] for start in range(0, len(nodes), first)]
    uniform = all(len(block) == first and len(set(block)) == 1 for block in blocks)
    return first if uniform and len(set(nodes)) == len(blocks) else 0


def _short(ranks: Sequence[int]) -> str:
    """Ranks as people write them: `0-7, 12`."""
    parts: list[list[int]] = []
    for rank in sorted(ranks):
        if parts and rank == parts[-1][-1] + 1:
            parts[-1].append(rank)
        else:
            parts.append([rank])
    return ", ".join(f"{part[0]}-{part[-1]}" if len(part) > 1 else str(part[0]) for part in parts)
