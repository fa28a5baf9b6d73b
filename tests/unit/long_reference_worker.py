"""One layer's forward pass and sink gradient of a reference in fp32, by the CPU kernel, for each size NxG: N tokens, G
key/value heads of 64 with three query heads each. Prints the most memory resident so far above the imports', in MiB
(Linux)."""

from __future__ import annotations

import sys
from pathlib import Path

import torch

from pipeline.sink.backends import KERNELS
from pipeline.sink.column import sink_gradient, sink_logprob
from pipeline.sink.layout import Scoring, Segments


def peak() -> float:
    """The most memory that was ever resident, in MiB."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) / 1024 for line in lines if line.startswith("VmHWM"))


def step(length: int, groups: int) -> None:
    """Forward and gradient."""
    q, k, v = (torch.randn(length, heads, 64) for heads in (3 * groups, groups, groups))
    segments = Segments.from_bounds([0, length], "cpu")
    attend, scoring = KERNELS["cpu_flash"].attend, Scoring(0.125)
    _, lse = attend(q, k, v, segments, scoring, 0)
    log_p = sink_logprob(q, k, lse, segments, 0, scoring)
    grad_p = torch.full_like(log_p, 1 / (length - 1))
    grads = sink_gradient(q, k, log_p, grad_p, segments, 0, scoring, attend)
    assert all(each.isfinite().all() and each.abs().max() > 0 for each in grads)


def main() -> None:
    """Measure each size; a smaller one must come before a larger one."""
    torch.manual_seed(0)
    step(64, 1)
    before = peak()
    for size in sys.argv[1:]:
        step(*map(int, size.split("x")))
        print(peak() - before)


if __name__ == "__main__":
    main()
