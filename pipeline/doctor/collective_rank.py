"""A program of its own, one rank of the collectives that are tried: a hang or crash in them ends this process alone.

`python collective_rank.py '{...}'` (the fields of `collective.Plan`, and "rank" and "device") prints one JSON line a
step. It imports nothing of the pipeline.
"""

from __future__ import annotations

import sys

if sys.path and sys.path[0].endswith("doctor"):
    del sys.path[0]  # this folder, which python puts first: its files must not stand in for installed modules

import json  # noqa: E402
import os  # noqa: E402
import statistics  # noqa: E402
import time  # noqa: E402
from collections.abc import Callable  # noqa: E402
from datetime import timedelta  # noqa: E402
from typing import Any  # noqa: E402

ROUNDS = 3
CONNECT = timedelta(seconds=30)  # to rank 0, which on one machine starts at the same time and may end at once
LEVELS = 64  # ranks differ by a factor of 1 to this, so that sums stay integers that fp32 holds at any number of ranks


class Ranks:
    """The process group, and what each rank is to send."""

    def __init__(self, plan: dict[str, Any]) -> None:
        import torch
        import torch.distributed as dist

        self.dist: Any = dist  # whose type information leaves the stores out
        self.torch = torch
        self.rank, self.size = plan["rank"], plan["size"]
        self.device = torch.device(plan["device"])
        if self.device.type == "cuda":
            torch.cuda.set_device(self.device)
        limit = timedelta(seconds=0.8 * plan["seconds"])  # to say what went wrong before the reader ends it
        server = plan["serve"] and self.rank == 0
        # Who serves waits for all: were it to fail and end before, the others would look for it until CONNECT.
        store = self.dist.TCPStore(
            plan["host"], plan["port"], world_size=self.size, is_master=server, wait_for_workers=plan["serve"],
            timeout=limit if server else min(limit, CONNECT),
        )  # fmt: skip
        store.set_timeout(limit)
        self.dist.init_process_group(
            plan["backend"], store=self.dist.PrefixStore(f"doctor/{plan['name']}", store), rank=self.rank,
            world_size=self.size, timeout=limit,
        )  # fmt: skip
        self.pattern = torch.arange(plan["bytes"] // 4, device=self.device).remainder(5).add(1).float()

    def sent(self, rank: int) -> Any:
        """What a rank contributes: small integers, different for ranks near each other."""
        return self.pattern * (rank % LEVELS + 1)

    def meet(self) -> None:
        """Return when every rank has come here."""
        self.dist.all_reduce(self.torch.ones(1, device=self.device))
        self.wait()

    def wait(self) -> None:
        """Return when the device has done what it was given."""
        if self.device.type == "cuda":
            self.torch.cuda.synchronize()

    def timed(self, do: Callable[[], None]) -> float:
        """Seconds of one call that all ranks begin together."""
        self.meet()
        start = time.monotonic()
        do()
        self.wait()
        return time.monotonic() - start

    def all_reduce(self) -> dict[str, Any]:
        """The sum over all ranks: right or not on this one, and the bus bandwidth in bytes a second."""
        total = self.sent(self.rank)
        self.dist.all_reduce(total)  # not timed: connections are made here
        expected = self.pattern * sum(rank % LEVELS + 1 for rank in range(self.size))
        right = bool(self.torch.equal(total, expected))
        seconds = statistics.median(self.timed(lambda: self.dist.all_reduce(total)) for _ in range(ROUNDS))
        moved = 2 * (self.size - 1) / self.size * total.numel() * total.element_size()
        return {"right": right, "bandwidth": moved / seconds}

    def shift(self, by: int) -> dict[str, Any]:
        """Send to the rank `by` further and receive from the one `by` before: bytes a second, right or not."""
        to, source = (self.rank + by) % self.size, (self.rank - by) % self.size
        mine, theirs = self.sent(self.rank), self.torch.empty_like(self.pattern)

        def exchange() -> None:
            operations = [
                self.dist.P2POp(self.dist.isend, mine, to),
                self.dist.P2POp(self.dist.irecv, theirs, source),
            ]
            for work in self.dist.batch_isend_irecv(operations):
                work.wait()

        seconds = min(self.timed(exchange) for _ in range(ROUNDS))
        right = bool(self.torch.equal(theirs, self.sent(source)))
        return {"from": source, "right": right, "bandwidth": theirs.numel() * theirs.element_size() / seconds}


def main() -> None:
    """Join, sum over all ranks, then exchange with others, saying each step before it begins."""
    plan = json.loads(sys.argv[1])
    lines = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print is not part of the answer

    def say(**line: Any) -> None:
        print(json.dumps(line), file=lines, flush=True)

    say(step="joining")
    ranks = Ranks(plan)
    say(step="all-reduce")
    say(step="all-reduce", **ranks.all_reduce())
    for by in plan["shifts"]:
        say(step=f"shift {by}")
        say(step=f"shift {by}", **ranks.shift(by))
    say(step="leaving")
    ranks.meet()  # nobody's connection closes under another's last exchange
    say(step="left", done=True)
    os._exit(0)  # all is said; taking gloo's threads down aborts the interpreter now and then


if __name__ == "__main__":
    main()
