"""One layer's forward pass and sink gradient of a reference of N tokens, 9 query and 3 key/value heads of 64 in fp32,
by the CPU kernel: prints the peak resident memory above the imports', in MiB (Linux)."""

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


def main() -> None:
    """Measure once."""
    length = int(sys.argv[1])
    attend, scoring = KERNELS["cpu_flash"].attend, Scoring(0.125)
    torch.manual_seed(0)
    small = torch.randn(64, 9, 64)
    attend(small, small[:, :3], small[:, :3], Segments.from_bounds([0, 64], "cpu"), scoring, 0)
    before = peak()
    q, k, v = (torch.randn(length, heads, 64) for heads in (9, 3, 3))
    segments = Segments.from_bounds([0, length], "cpu")
    _, lse = attend(q, k, v, segments, scoring, 0)
    log_p = sink_logprob(q, k, lse, segments, 0, scoring)
    grad_p = torch.full_like(log_p, 1 / (length - 1))
    grads = sink_gradient(q, k, log_p, grad_p, segments, 0, scoring, attend)
    assert all(each.isfinite().all() and each.abs().max() > 0 for each in grads)
    print(peak() - before)


if __name__ == "__main__":
    main()
