"""Who of a job's ranks is here, and what each one says: over a TCPStore, where a rank that never comes is known by its
absence and nobody hangs in a collective with it."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

LAUNCHERS = (("RANK", "LOCAL_RANK", "WORLD_SIZE"), ("SLURM_PROCID", "SLURM_LOCALID", "SLURM_NTASKS"))
POLL = 0.05  # seconds
GRACE = 10.0  # seconds that ranks wait longer for rank 0's word than rank 0 for theirs, and it for their leaving


class NoMeeting(RuntimeError):
    """This rank and rank 0 cannot reach each other, or not in time."""


@dataclass(frozen=True)
class Place:
    """This process among the ranks of a job, and where rank 0 is met."""

    rank: int
    local_rank: int
    size: int
    host: str
    port: int


def place(environment: Mapping[str, str]) -> Place:
    """From what srun, deepspeed or torchrun export. Errors: ValueError naming the variables."""
    for names in LAUNCHERS:
        if not all(name in environment for name in names):
            continue
        rank, local_rank, size = (_number(environment, name) for name in names)
        if not 0 <= rank < size:
            raise ValueError(f"{names[0]} {rank}: give 0 to {size - 1}, for {names[2]} {size}")
        if "MASTER_ADDR" not in environment or "MASTER_PORT" not in environment:
            raise ValueError("--distributed: export MASTER_ADDR and MASTER_PORT, rank 0's host and a free port there")
        return Place(rank, local_rank, size, environment["MASTER_ADDR"], _number(environment, "MASTER_PORT"))
    known = " or ".join(", ".join(names) for names in LAUNCHERS)
    raise ValueError(f"--distributed: no rank in the environment ({known}): start it by srun, deepspeed or torchrun")


def _number(environment: Mapping[str, str], name: str) -> int:
    try:
        return int(environment[name])
    except ValueError:
        raise ValueError(f"{name} {environment[name]}: give a number") from None


class Roll:
    """Every rank tells rank 0, and rank 0 announces to all. Values are JSON; `serve` opens the store for the others.

    Errors: NoMeeting if rank 0 cannot be reached within `seconds`, or torch, whose store this is, cannot be imported.
    """

    def __init__(self, here: Place, seconds: float, *, serve: bool = False) -> None:
        os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "FATAL")  # or torch reports each attempt to reach rank 0
        try:
            import torch.distributed as dist
        except Exception as error:  # whatever a broken installation raises
            why = f"torch cannot be imported: {_first_line(error)}: make setup"
            raise NoMeeting(why) from error
        self.here = here
        stores: Any = dist  # whose type information leaves them out
        agent = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"  # torchrun's agent listens at MASTER_PORT
        serves = serve and not agent
        try:
            server = stores.TCPStore(
                here.host, here.port, is_master=serves, timeout=timedelta(seconds=seconds), wait_for_workers=False
            )
        except RuntimeError as error:
            if serves:
                why = f"port {here.port} cannot be opened ({_first_line(error)}): choose another MASTER_PORT"
            else:
                why = f"rank 0 did not answer at {here.host}:{here.port} within {seconds:g} s"
            raise NoMeeting(why) from error
        self.store = stores.PrefixStore("doctor/roll", server)

    def tell(self, step: str, value: Any) -> None:
        """Say this rank's part of a step. Errors: NoMeeting if rank 0 has ended."""
        try:
            self.store.set(f"{step}/{self.here.rank}", json.dumps(value))
        except RuntimeError as error:
            raise NoMeeting(f"rank 0 ended: {_first_line(error)}") from error

    def gather(self, step: str, ranks: Sequence[int], seconds: float) -> dict[int, Any]:
        """What those of `ranks` said that did in time; for rank 0."""
        said: dict[int, Any] = {}
        deadline = time.monotonic() + seconds
        while True:
            for rank in ranks:
                if rank not in said and self.store.check([f"{step}/{rank}"]):
                    said[rank] = self.heard(step, rank)
            if len(said) == len(ranks) or time.monotonic() > deadline:
                return said
            time.sleep(POLL)

    def heard(self, step: str, rank: int) -> Any:
        """What a rank said last of a step; None if nothing."""
        key = f"{step}/{rank}"
        return json.loads(self.store.get(key)) if self.store.check([key]) else None

    def announce(self, step: str, value: Any) -> None:
        """Say to all; for rank 0."""
        self.store.set(step, json.dumps(value))

    def listen(self, step: str, seconds: float) -> Any:
        """What rank 0 announces. Errors: NoMeeting if it does not within `seconds`, or has ended."""
        try:
            self.store.wait([step], timedelta(seconds=seconds))
            return json.loads(self.store.get(step))
        except RuntimeError as error:
            raise NoMeeting(f"rank 0 did not say {step!r} in {seconds:g} s, or ended: {_first_line(error)}") from error


def _first_line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0][:200]
