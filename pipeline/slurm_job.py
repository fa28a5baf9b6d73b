"""What Slurm tells a task about its job, and what training tells the script that started it. Standard library only: it
is asked before anything heavy is imported."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping
from pathlib import Path

# Exit codes of training beside 0 (done), 1 (failed) and 2 (the user's input); slurm/launch.sh and slurm/README.md have
# them too.
STOPPED = 85  # by a signal, with a checkpoint of this very step: to be requeued
HALTED = 86  # by the switch file STOP, with a checkpoint: not to be requeued
HUNG = 87  # by the watchdog, without a new checkpoint: to be requeued

MARKER = "REQUEUE_MARKER"  # names the file that asks for a requeue, for whoever can do that
LOWEST_PORT, PORTS = 10000, 20000  # below 32768, where Linux takes the ports of outgoing connections from

# What run.json keeps of the environment.
RECORDED = (
    "SLURM_CLUSTER_NAME", "SLURM_JOB_ID", "SLURM_ARRAY_JOB_ID", "SLURM_ARRAY_TASK_ID", "SLURM_JOB_NAME",
    "SLURM_JOB_PARTITION", "SLURM_JOB_NODELIST", "SLURM_JOB_NUM_NODES", "SLURM_GPUS_PER_NODE", "SLURM_STEP_NUM_TASKS",
    "SLURM_RESTART_COUNT", "SLURM_SUBMIT_DIR", "MASTER_ADDR", "MASTER_PORT",
)  # fmt: skip


def rank_variables(environment: Mapping[str, str]) -> dict[str, str]:
    """RANK, LOCAL_RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT of a task that srun started.

    Empty where another launcher has set RANK, and outside a step: a batch script has a SLURM_PROCID as well.
    """
    if "RANK" in environment or "SLURM_STEP_NUM_TASKS" not in environment:
        return {}
    return {
        "RANK": environment["SLURM_PROCID"],
        "LOCAL_RANK": environment["SLURM_LOCALID"],
        "WORLD_SIZE": environment["SLURM_STEP_NUM_TASKS"],
        "MASTER_ADDR": environment.get("MASTER_ADDR") or expand(environment["SLURM_STEP_NODELIST"])[0],
        "MASTER_PORT": environment.get("MASTER_PORT") or str(LOWEST_PORT + int(environment["SLURM_JOB_ID"]) % PORTS),
    }


def expand(nodes: str) -> list[str]:
    """Slurm's short form of node names, `n[01-03,7],m`, as a list."""
    names = []
    for prefix, inside, suffix in re.findall(r"([^,\[\]]+)(?:\[([^\]]*)\])?([^,\[\]]*)", nodes):
        for part in inside.split(","):
            first, _, last = part.partition("-")
            numbers = [str(n).zfill(len(first)) for n in range(int(first), int(last) + 1)] if last else [first]
            names += [f"{prefix}{number}{suffix}" for number in numbers]
    return names


def record(environment: Mapping[str, str]) -> dict[str, str]:
    """The job for run.json: Slurm's variables, and the command that goes on with the run. Empty outside of Slurm."""
    if "SLURM_JOB_ID" not in environment:
        return {}
    found = {name: environment[name] for name in RECORDED if name in environment}
    return found | ({"resume": environment["RESUME_COMMAND"]} if "RESUME_COMMAND" in environment else {})


def ask_for_requeue(code: int, reason: str) -> None:
    """Leave the marker that slurm/launch.sh looks for; nothing where nobody does."""
    if MARKER in os.environ:
        path = Path(os.environ[MARKER])
        temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
        temporary.write_text(json.dumps({"code": code, "reason": reason}) + "\n", encoding="utf-8")
        temporary.replace(path)
