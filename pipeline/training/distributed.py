"""The ranks: who am I, before and after the process group exists, and what all ranks have to agree on."""

from __future__ import annotations

import ctypes
import os
import socket
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

from pipeline.slurm_job import rank_variables

M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_MAX = -1, -2, -4  # malloc.h of glibc

TIMEOUT = timedelta(hours=2)  # saving a 70B checkpoint to a slow disk must not look like a dead rank


@dataclass(frozen=True)
class World:
    """This process among all ranks."""

    rank: int
    local_rank: int
    size: int

    @property
    def main(self) -> bool:
        """Rank 0 prints and writes the run's records."""
        return self.rank == 0


def world() -> World:
    """From the launcher's environment, srun's as well; a plain `python` call is one rank. Chooses DeepSpeed's
    accelerator before it is imported."""
    os.environ.update(rank_variables(os.environ))
    import torch

    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    # DeepSpeed 0.19 calls collectives under names that torch 2.13 renames: a warning for each, at each call.
    warnings.filterwarnings("ignore", message=r"`torch\.distributed\.\w+` is deprecated", category=FutureWarning)
    return World(
        int(os.environ.get("RANK", "0")),
        int(os.environ.get("LOCAL_RANK", "0")),
        int(os.environ.get("WORLD_SIZE", "1")),
    )


def initialize_process_group(here: World) -> Any:
    """Join the process group (nccl on CUDA, gloo elsewhere) and return this rank's torch.device."""
    import deepspeed
    import torch

    if "MASTER_ADDR" not in os.environ:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), RANK="0", LOCAL_RANK="0", WORLD_SIZE="1")
    cuda = torch.cuda.is_available()
    if cuda:
        torch.cuda.set_device(here.local_rank)
    else:
        keep_freed_memory()
        # Its shared-memory collectives serve inference alone, yet every start would compile them, or at least take
        # their build lock; a rank killed just then leaves the lock, and every later run waits for it forever.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.init_distributed(dist_backend="nccl" if cuda else "gloo", timeout=TIMEOUT, verbose=False)
    return torch.device("cuda", here.local_rank) if cuda else torch.device("cpu")


def together(here: World, action: Callable[[], None], *, main_only: bool = False) -> list[str]:
    """Run `action` on every rank, or on rank 0 alone, and return the problems of all ranks, the same list on each:
    whatever goes wrong on one rank, the others must not wait for it in their next collective. Collective."""
    import torch.distributed as dist

    problem = None
    if here.main or not main_only:
        try:
            action()
        except (OSError, RuntimeError, ValueError) as error:
            problem = str(error)
    found: list[str | None] = [None] * here.size
    dist.all_gather_object(found, problem)
    return [f"rank {rank}: {each}" if here.size > 1 else each for rank, each in enumerate(found) if each is not None]


def leave_process_group(here: World) -> None:
    """The end of all collectives, on every rank; the door that called for them ends soon after.

    gloo's connections of several ranks stay until the process is gone: taking their threads down aborts the
    interpreter now and then ("terminate called without an active exception"), and the launcher calls a finished run
    failed.
    """
    import torch.distributed as dist

    if here.size > 1 and dist.get_backend() == "gloo":
        dist.barrier()  # nobody's connection closes under another's last exchange
    else:
        dist.destroy_process_group()


def keep_freed_memory() -> None:
    """Let glibc keep freed blocks instead of returning them to the system.

    On a CPU, ZeRO-3 allocates and frees a copy of every layer at every pass, and a forward pass all activations;
    handing the pages back and faulting them in again costs up to a third of a training step. No block is mapped on its
    own (M_MMAP_MAX), because those of 32 MiB and more always would be. Does nothing where the C library is another.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except AttributeError:
        return
    for option, value in ((M_MMAP_MAX, 0), (M_TRIM_THRESHOLD, -1), (M_TOP_PAD, 256 << 20)):
        mallopt(option, value)
