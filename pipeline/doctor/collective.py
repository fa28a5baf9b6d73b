"""Collectives between processes: started, bounded in time, and judged; a rank that is wrong or slow is named."""

from __future__ import annotations

import json
import statistics
import sys
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from pipeline.doctor.finding import FAILED, OK, WARNING, Finding, size
from pipeline.doctor.probing import run_steps

PROGRAM = Path(__file__).with_name("collective_rank.py")
GLOO_BYTES, NCCL_BYTES = 8 << 20, 256 << 20
MOST_PARTNERS = 8  # of one rank; more would only take longer to name the same node
SLOW = 0.5  # of the median rank's best connection

BROKEN = "look at this node's network and devices first (NCCL_DEBUG=INFO says more)"
CORRUPT = "leave this node out: its memory, its links or its device corrupts data"


@dataclass(frozen=True)
class Plan:
    """What every rank of one trial is to do; ranks meet in a TCPStore at host:port, which rank 0 serves if `serve`."""

    name: str
    backend: str
    size: int
    bytes: int
    host: str
    port: int
    serve: bool
    shifts: Sequence[int]
    seconds: float


@dataclass(frozen=True)
class Trial:
    """One rank's part: its steps by name, and how it ended if not well."""

    steps: Mapping[str, Mapping[str, Any]]
    at: str
    ended: str | None


def run_rank(plan: Plan, rank: int, device: str) -> Trial:
    """Run one rank's part in a process of its own that is killed when its time is up."""
    arguments = json.dumps({**asdict(plan), "rank": rank, "device": device})
    lines, ended, _ = run_steps([sys.executable, str(PROGRAM), arguments], plan.seconds)
    return Trial(
        {line["step"]: line for line in lines if len(line) > 1}, lines[-1]["step"] if lines else "start", ended
    )


def run_here(name: str, backend: str, devices: Sequence[str], port: int, seconds: float) -> dict[int, Trial]:
    """Run all ranks on this machine, one a device."""
    count = len(devices)
    amount = NCCL_BYTES if backend == "nccl" else GLOO_BYTES
    plan = Plan(name, backend, count, amount, "127.0.0.1", port, True, shifts(count, 1), seconds)
    with ThreadPoolExecutor(count) as pool:
        trials = [pool.submit(run_rank, plan, rank, device) for rank, device in enumerate(devices)]
        return {rank: trial.result() for rank, trial in enumerate(trials)}


def shifts(ranks: int, per_node: int) -> list[int]:
    """Distances at which ranks exchange: the same GPU of other nodes where there are several, else every other rank.

    per_node: ranks on each node, 0 where nodes have different numbers of them.
    """
    step = per_node if 0 < per_node < ranks else 1
    return list(range(step, ranks, step))[:MOST_PARTNERS]


def judge(backend: str, trials: Mapping[int, Trial], names: Mapping[int, str]) -> Iterator[tuple[int, Finding]]:
    """Findings about the collectives of all ranks, each with the rank that it is about.

    names: a rank by what a user knows it as, such as `rank 3 of node-b`.
    """
    check = f"all-reduce ({backend})"
    if broken := {rank: trial for rank, trial in trials.items() if trial.ended is not None}:
        # When one rank ends the others lose their connections: the ones that got least far are to be looked at.
        least = min(len(trial.steps) for trial in broken.values())
        for rank, trial in sorted(broken.items()):
            found = f"{names[rank]}, {trial.at}: {trial.ended}"
            yield rank, Finding(check, FAILED, found, BROKEN if len(trial.steps) == least else "")
        return
    sums = {rank: trial.steps["all-reduce"] for rank, trial in trials.items()}
    wrong = sorted(rank for rank, answer in sums.items() if not answer["right"])
    for rank in _senders_of_wrong(trials) if len(wrong) == len(sums) else wrong:
        found = f"{names[rank]} spoils the sum: {len(wrong)} of {len(sums)} ranks have a wrong one"
        yield rank, Finding(check, FAILED, found, CORRUPT)
    if not wrong:
        slowest = min(answer["bandwidth"] for answer in sums.values())
        yield 0, Finding(check, OK, f"{len(sums)} ranks, the right sum at {size(slowest)}/s")
    yield from _connections(trials, names)


def _senders_of_wrong(trials: Mapping[int, Trial]) -> list[int]:
    """Ranks whose data arrived wrong at every rank they sent it to; all, where the exchanges tell none apart."""
    right: dict[int, list[bool]] = {}
    for trial in trials.values():
        for answer in _exchanges(trial):
            right.setdefault(answer["from"], []).append(answer["right"])
    return sorted(rank for rank, seen in right.items() if not any(seen)) or sorted(trials)


def _connections(trials: Mapping[int, Trial], names: Mapping[int, str]) -> Iterator[tuple[int, Finding]]:
    """Exchanges between pairs of ranks: a good rank has at least one fast partner, a slow one none."""
    best: dict[int, float] = {}
    corrupt = False
    for rank, trial in trials.items():
        for answer in _exchanges(trial):
            if not answer["right"]:
                found = f"{names[rank]} received wrong data from {names[answer['from']]}"
                yield rank, Finding("connections", FAILED, found, CORRUPT)
                corrupt = True
            for end in (rank, answer["from"]):
                best[end] = max(best.get(end, 0.0), answer["bandwidth"])
    if len(best) < 3:
        return  # two ranks share their one connection
    usual = statistics.median(best.values())
    slow = sorted(rank for rank, bandwidth in best.items() if bandwidth < SLOW * usual)
    for rank in slow:
        found = f"{names[rank]} reaches nobody faster than {size(best[rank])}/s; half of the ranks {size(usual)}/s"
        yield rank, Finding("connections", WARNING, found, "check this node's links, or leave it out")
    if not slow and not corrupt:
        yield 0, Finding("connections", OK, f"{size(min(best.values()))}/s and more, each rank with its best partner")


def _exchanges(trial: Trial) -> list[Mapping[str, Any]]:
    return [answer for answer in trial.steps.values() if "from" in answer]
