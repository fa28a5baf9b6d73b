"""What the nodes of a job have to have in common, and which one stands out."""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from pipeline.doctor.finding import FAILED, OK, WARNING, Finding

CLOCK_TOLERANCE = 1.0  # seconds: file times and logs of different nodes are compared
SLOW = 0.5  # of the median of all


@dataclass(frozen=True)
class Report:
    """One rank's findings. clock: its seconds since the epoch at the moment at which all ranks were told to start."""

    rank: int
    node: str
    findings: Sequence[Finding]
    clock: float


def compare(reports: Sequence[Report]) -> Iterator[tuple[str, Finding]]:
    """Findings about nodes against each other, each with its node."""
    yield from _versions(reports)
    yield from _clocks(reports)
    yield from _rates(reports)


def _versions(reports: Sequence[Report]) -> Iterator[tuple[str, Finding]]:
    """Values that every node must share; most nodes are right, and in doubt rank 0's is."""
    values: dict[str, dict[str, str]] = {}
    for report in reports:
        for finding in report.findings:
            for name, value in finding.same.items():
                values.setdefault(name, {})[report.node] = value
    nodes = list(dict.fromkeys(report.node for report in reports))
    different: dict[str, list[str]] = {}
    for name in sorted(values):
        seen = {node: values[name].get(node, "nothing") for node in nodes}
        usual = Counter(seen.values()).most_common(1)[0][0]  # the first counted among equals: rank 0's
        for node, value in seen.items():
            if value != usual:
                different.setdefault(node, []).append(f"{name} {value} (others {usual})")
    for node, lines in different.items():
        yield (
            node,
            Finding("same on all nodes", FAILED, ", ".join(lines), "install the same environment on every node"),
        )
    if not different and len(nodes) > 1:
        yield nodes[0], Finding("same on all nodes", OK, f"{len(values)} versions and settings on {len(nodes)} nodes")


def _clocks(reports: Sequence[Report]) -> Iterator[tuple[str, Finding]]:
    """The clocks at one moment, one a node."""
    clocks = {report.node: report.clock for report in reversed(reports)}
    if len(clocks) < 2:
        return
    usual = statistics.median_low(clocks.values())
    off = {node: clock - usual for node, clock in clocks.items() if abs(clock - usual) > CLOCK_TOLERANCE}
    for node, seconds in off.items():
        found = f"{abs(seconds):.1f} s {'ahead' if seconds > 0 else 'behind'}"
        yield node, Finding("clocks", WARNING, found, "synchronise the clocks (chrony, ntp)")
    if not off:
        yield reports[0].node, Finding("clocks", OK, f"within {CLOCK_TOLERANCE:g} s")


def _rates(reports: Sequence[Report]) -> Iterator[tuple[str, Finding]]:
    """Rates far below those of the other ranks: a throttled device, a worn disk."""
    rates: dict[str, list[tuple[Report, float]]] = {}
    for report in reports:
        for finding in report.findings:
            for name, rate in finding.rates.items():
                rates.setdefault(name, []).append((report, rate))
    for name, measured in rates.items():
        usual = statistics.median(rate for _, rate in measured)
        for report, rate in measured:
            if len(measured) > 2 and rate < SLOW * usual:
                found = f"rank {report.rank}: {rate:.0f}, and half of the ranks have {usual:.0f} or more"
                yield report.node, Finding(name, WARNING, found, "look at this node, or leave it out")
