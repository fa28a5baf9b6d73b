"""One rank that trains the cases of a JSON file with the product's own code and counts what the planner predicts.

cases: {name: argv}. Rank 0 writes OUT: by case, bytes of the states that DeepSpeed's tensors hold, bytes that autograd
saved when the last step's backward pass began, elements of its parameter gathers, bytes of weights that were whole at
one time, and the row that it trained on.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch

from pipeline.training.distributed import initialize_process_group, world

here = world()
import deepspeed  # noqa: E402
from deepspeed.runtime.zero.partition_parameters import ZeroParamStatus  # noqa: E402
from deepspeed.runtime.zero.partitioned_param_coordinator import PartitionedParameterCoordinator  # noqa: E402

from pipeline.training.prepared import Prepared  # noqa: E402
from pipeline.training.run import start  # noqa: E402
from tests.command_lines import prepared  # noqa: E402
from tests.ranks import end_rank  # noqa: E402

STEPS = 3  # DeepSpeed learns the order of its weights in the first two
WHOLE = {"most": 0}  # bytes of weights that were whole after a fetch
GATHERED: list[int] = []  # elements of each parameter all-gather


def watch_gathers() -> None:
    """Count what DeepSpeed gathers, and what is whole at one time."""
    for name in ("allgather_fn", "all_gather_into_tensor"):
        original = getattr(deepspeed.comm, name)

        def counted(output: Any, *args: Any, original: Any = original, **kwargs: Any) -> Any:
            GATHERED.append(output.numel())
            return original(output, *args, **kwargs)

        setattr(deepspeed.comm, name, counted)
    fetch = PartitionedParameterCoordinator.fetch_sub_module

    def fetched(self: Any, module: Any, forward: bool) -> None:
        fetch(self, module, forward)
        whole = [p for p in PARAMETERS if p.ds_status != ZeroParamStatus.NOT_AVAILABLE and not p.ds_persist]
        WHOLE["most"] = max(WHOLE["most"], sum(p.ds_numel_aligned * p.ds_tensor.element_size() for p in whole))

    PartitionedParameterCoordinator.fetch_sub_module = fetched


PARAMETERS: list[Any] = []


class Saved:
    """Bytes of distinct storages that autograd saves, parameters left out."""

    def __init__(self) -> None:
        self.sizes: dict[int, int] = {}
        self.kept: list[Any] = []

    def pack(self, tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        weights = {p.data.untyped_storage()._cdata for p in PARAMETERS}
        if hasattr(tensor, "ds_id") or storage._cdata in weights:
            return tensor
        self.sizes[storage._cdata] = storage.nbytes()
        self.kept.append(storage)  # so that its number is not given again
        return tensor.detach()


def bytes_of(tensors: Any) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def states_of(engine: Any) -> dict[str, int]:
    """Bytes of what this rank holds between two steps."""
    zero = engine.optimizer
    moments = [state[name] for state in zero.optimizer.state.values() for name in ("exp_avg", "exp_avg_sq")]
    return {
        "parameters": bytes_of(p.ds_tensor for p in engine.module.parameters()),
        "whole_parameters": bytes_of(p.data for p in engine.module.parameters() if p.ds_persist),
        "secondary": bytes_of(
            p.ds_secondary_tensor for p in engine.module.parameters() if p.ds_secondary_tensor is not None
        ),
        "gradients": bytes_of([zero.grad_partitions_flat_buffer]),
        "optimizer": bytes_of([*zero.fp32_partitioned_groups_flat, *moments]),
        "bucket": bytes_of(bucket.buffer for bucket in zero.ipg_buckets.values() if bucket.buffer is not None),
    }


def run_case(run: Prepared, device: torch.device) -> dict[str, Any]:
    """Train a few steps and count in the last one."""
    engine, loop = start(run, device)
    PARAMETERS[:] = engine.deepspeed.module.parameters()
    for _ in range(STEPS - 1):
        loop.train_step()
    saved, counted = Saved(), []
    backward = engine.deepspeed.backward

    def count_and_go_on(loss: Any, **kwargs: Any) -> Any:
        counted.append(sum(saved.sizes.values()))
        return backward(loss, **kwargs)

    engine.deepspeed.backward = count_and_go_on
    step = engine.deepspeed.step
    gathered: list[int] = []
    held: dict[str, int] = {}

    def note_and_step() -> None:
        gathered.extend(GATHERED)  # the step gathers the small weights again
        held.update(states_of(engine.deepspeed))  # and drops the second shards of what it changes
        step()

    engine.deepspeed.step = note_and_step
    GATHERED.clear()
    WHOLE["most"] = 0
    with torch.autograd.graph.saved_tensors_hooks(saved.pack, lambda tensor: tensor):
        loop.train_step()
    stream = run.streams["train"]
    rows = stream.micro_batch(STEPS - 1, here.rank)
    found = {
        "states": held,
        "saved": max(counted),
        "gathered": sum(gathered),
        "whole": WHOLE["most"],
        "users": stream.pool.lengths[rows].tolist(),
        "trained": int(stream.pool.trained[rows].sum()),
        "reference": int(run.streams["harmful"].pool.lengths.max()) if run.method.pools else 0,
    }
    engine.deepspeed.destroy()
    return found


def main() -> None:
    """Run all cases in one process group."""
    cases, out = json.loads(Path(sys.argv[1]).read_text()), Path(sys.argv[2])
    device = initialize_process_group(here)
    watch_gathers()
    # Before a ZeRO-3 engine changes how models are made.
    runs = {name: prepared(argv, here) for name, argv in cases.items()}
    found = {}
    for name, run in runs.items():
        found[name] = run_case(run, device)
        if here.main:
            out.write_text(json.dumps(found))
    end_rank(here)


main()
