"""What the planner predicts of a run, said when it starts and held against what was measured when it ends."""

from __future__ import annotations

import os
from dataclasses import dataclass

import torch

from pipeline.planning.description import shown
from pipeline.planning.hardware import Gpu, of_device_name, unlisted
from pipeline.planning.plan import Plan, plan
from pipeline.training.planned import prepared_job
from pipeline.training.prepared import Prepared


@dataclass(frozen=True)
class Forecast:
    """A rank's plan. `reason` says why there is none. timed: whether the hardware's speed is known."""

    plan: Plan | None
    reason: str = ""
    timed: bool = False


def forecast(run: Prepared, device: torch.device) -> Forecast:
    """Plan a run on this machine's devices; before the model is loaded, because afterwards transformers shards every
    model that is made. A run that cannot be planned is trained all the same."""
    cuda = device.type == "cuda"
    gpu: Gpu | None = None
    if cuda:
        properties = torch.cuda.get_device_properties(device)
        name, memory = properties.name, properties.total_memory
        gpu = of_device_name(name, memory)
    else:
        name, memory = "cpu", 0
    per_node = int(os.environ.get("LOCAL_WORLD_SIZE") or (torch.cuda.device_count() if cuda else run.world.size))
    try:
        found = plan(prepared_job(run, gpu or unlisted(name, memory), per_node, cuda=cuda))
    except Exception as error:  # a setting that is not planned, or whatever a model's own code does without numbers
        return Forecast(None, (str(error) or repr(error)).splitlines()[0])
    return Forecast(found, timed=gpu is not None)


def expectation(expected: Forecast) -> str:
    """The prediction in one line."""
    found = expected.plan
    if found is None:
        return f"not predicted: {expected.reason}"
    held = found.states
    states = held.parameters + held.whole_parameters + held.secondary
    passing = found.gathers.live + found.gathers.copied + found.reducing
    line = (
        f"predicted peak {shown(found.peak)} a rank: parameters {shown(states)}, gradients {shown(held.gradients)}, "
        f"optimizer {shown(held.optimizer)}, reduce bucket {shown(held.bucket)}, gathered and reduced "
        f"{shown(passing)}, activations {shown(found.activations.peak)}"
    )
    if held.on_host:
        line += f"; on the host {shown(held.on_host)}"
    if expected.timed:
        line += f"; {found.time.span} s a step"
        if not found.fits:
            line += f"; does NOT fit the usable {shown(found.usable)}: see tools/plan.py"
    return line


def outcome(expected: Forecast, measured: dict[str, float]) -> str | None:
    """Predicted against measured, in one line; None where nothing predicted was measured.

    measured: the last logged values: peak_memory_gib (CUDA alone), seconds_per_step.
    """
    found = expected.plan
    if found is None or "peak_memory_gib" not in measured:
        return None
    predicted = found.peak / 2**30
    peak = measured["peak_memory_gib"]
    line = f"peak memory: predicted {predicted:.2f} GiB, measured {peak:.2f} GiB ({predicted / peak - 1:+.1%})"
    if expected.timed:
        line += f"; step: predicted {found.time.span} s, measured {measured['seconds_per_step']:.2f} s"
    return line
