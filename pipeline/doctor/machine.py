"""The checks of one machine, in the order in which a trouble explains the ones below it."""

from __future__ import annotations

import functools
import os
import socket
from collections.abc import Callable, Iterator, Set
from dataclasses import dataclass
from pathlib import Path

from pipeline.doctor import accelerator, collective, disk, host, kernels, network, packages
from pipeline.doctor.finding import Check, Finding, examine
from pipeline.doctor.probing import Answers, run_probe

REQUIRABLE = ("cuda", "triton", "compilers", *kernels.FLASH)


@dataclass(frozen=True)
class Options:
    """What the command line asks for.

    timeout: seconds for a process of its own, or for ranks to answer; json: a file for all findings.
    """

    output_dir: Path
    require: Set[str]
    timeout: float
    json: Path | None


def examine_machine(options: Options, starting: Callable[[str], None]) -> Iterator[Finding]:
    """All checks of a machine that no job runs on."""
    probe = functools.cache(lambda: run_probe(_modules(), "all", options.timeout))
    checks = [
        *machine_checks(options, probe, node_ranks=1, local_rank=None),
        ("port", network.port),
        ("all-reduce", lambda: _collectives(probe(), options.timeout)),
    ]
    return examine(checks, starting)


def examine_rank(
    options: Options, local_rank: int, node_ranks: int, starting: Callable[[str], None]
) -> tuple[list[Finding], str]:
    """A rank's part of its node: everything on the node's first, the device alone on the others; and the torch device
    that this rank would train on."""
    first = local_rank == 0
    probe = functools.cache(lambda: run_probe(_modules() if first else ["torch"], local_rank, options.timeout))
    if first:
        checks = machine_checks(options, probe, node_ranks=node_ranks, local_rank=local_rank)
    else:
        checks = [("devices", lambda: accelerator.devices(probe(), node_ranks, local_rank))]
    findings = list(examine(checks, starting))
    good = "capability" in probe().get(f"device {local_rank}", {})
    return findings, f"cuda:{local_rank}" if good else "cpu"


def machine_checks(
    options: Options, probe: Callable[[], Answers], *, node_ranks: int, local_rank: int | None
) -> list[Check]:
    """What is looked at on every node, whether or not other nodes are there."""
    require = options.require
    return [
        ("python", packages.python),
        ("packages", packages.requirements),
        ("pinned versions", packages.pins),
        ("user packages", packages.user_site),
        ("code", packages.code),
        ("imports", lambda: packages.imports(probe())),
        ("gpu driver", lambda: accelerator.driver(require)),
        ("torch", lambda: accelerator.torch_cuda(probe(), require)),
        ("devices", lambda: accelerator.devices(probe(), node_ranks, local_rank)),
        ("flash-attn", lambda: kernels.flash_attention(probe(), require)),
        ("triton", lambda: kernels.triton(probe(), require)),
        ("compilers", lambda: kernels.compilers(probe(), require)),
        ("host memory", host.memory),
        ("/dev/shm", host.shared_memory),
        ("cores", host.cores),
        ("limits", host.limits),
        ("text encoding", host.text),
        ("umask", host.umask),
        ("output_dir", lambda: disk.output_dir(options.output_dir)),
        ("caches", disk.caches),
        ("hub", disk.hub_offline),
        ("host name", network.hostname),
        ("interfaces", network.interfaces),
    ]


def node_name() -> str:
    """This node as its scheduler knows it, else by its host name; several Slurm nodes may share a host."""
    return os.environ.get("SLURMD_NODENAME") or socket.gethostname()


def _modules() -> list[str]:
    return [*packages.modules(), *kernels.flash_modules()]


def _collectives(answers: Answers, seconds: float) -> Iterator[Finding]:
    """Two gloo ranks, and one NCCL rank a GPU where there are several."""
    trials = [("gloo", ["cpu", "cpu"])]
    count = answers.get("torch", {}).get("count", 0)
    if count > 1:
        trials.append(("nccl", [f"cuda:{index}" for index in range(count)]))
    for backend, devices in trials:
        results = collective.run_here(backend, backend, devices, network.free_port(), seconds)
        for _, finding in collective.judge(backend, results, {rank: f"rank {rank}" for rank in results}):
            yield finding
