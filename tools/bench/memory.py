"""The most memory a call holds at once beyond what lives before it, from the allocator's own events.

CUDA counts it itself. On a CPU the profiler's allocation events are summed, which gives the same number at every run;
the resident set of the process does not, because freed pages stay with it.
"""

from __future__ import annotations

import gc
import os
from collections.abc import Callable

import torch


def peak_bytes(call: Callable[[], object], device: torch.device) -> int:
    """Run `call` and return its peak in bytes above the memory held when it began."""
    if device.type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        call()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    os.environ.setdefault("KINETO_LOG_LEVEL", "5")  # else every profile prints when it starts and stops
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        call()
    # The public list folds allocations into the operators that made them and loses their order.
    events = [each for each in recorded.profiler.kineto_results.events() if each.name() == "[memory]"]
    live = peak = 0
    for event in sorted(events, key=lambda each: each.start_ns()):
        live += event.nbytes()
        peak = max(peak, live)
    return peak


def live_bytes(device: torch.device) -> int:
    """What all tensors of a device hold that Python can reach; views and shared storages count once."""
    gc.collect()
    storages = (
        each.untyped_storage()
        for each in gc.get_objects()
        if isinstance(each, torch.Tensor) and each.device.type == device.type
    )
    return sum({each.data_ptr(): each.nbytes() for each in storages}.values())
