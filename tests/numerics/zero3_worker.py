"""One rank of a ZeRO-3 run: trains the cases of a JSON file with the product's own code and saves what the tests
compare.

cases: {name: {"argv": [...], "broken": a name of broken.py}}; written by rank 0 to OUT/name.pt: initial and final
trainable tensors, the first step's gradients, each step's gradient norm, parameter all-gathers with the elements they
gathered, the method's state and the counters after it; whether on all ranks the weights were bit for bit the step's
first ones when the optimizer stepped, frozen ones never moved, and the states were the same.
"""

from __future__ import annotations

import gc
import json
import sys
from pathlib import Path
from typing import Any

import torch

from pipeline.training.distributed import initialize_process_group, world

here = world()
import deepspeed  # noqa: E402
from deepspeed.utils import nvtx, safe_get_full_grad  # noqa: E402

from pipeline.training.prepared import Prepared  # noqa: E402
from pipeline.training.run import start  # noqa: E402
from tests.command_lines import prepared  # noqa: E402
from tests.numerics.broken import broken  # noqa: E402
from tests.ranks import end_rank  # noqa: E402

GATHERS: list[int] = []  # elements of each parameter all-gather


def count_gathers() -> None:
    """Record every all-gather that DeepSpeed makes."""
    for name in ("allgather_fn", "all_gather_into_tensor", "all_gather", "all_gather_coalesced"):
        original = getattr(deepspeed.comm, name)

        def counted(output: Any, *args: Any, original: Any = original, **kwargs: Any) -> Any:
            GATHERS.append(sum(each.numel() for each in output) if isinstance(output, list) else output.numel())
            return original(output, *args, **kwargs)

        setattr(deepspeed.comm, name, counted)


def full_tensors(engine: Any) -> dict[str, torch.Tensor]:
    """Every trainable parameter, gathered one at a time."""
    tensors = {}
    for name, parameter in engine.deepspeed.module.named_parameters():
        if parameter.requires_grad:
            with deepspeed.zero.GatheredParameters([parameter]):
                tensors[name] = parameter.detach().float().clone()
    return tensors


def seen(engine: Any) -> list[torch.Tensor]:
    """This rank's shards of all parameters, as a forward pass would gather them."""
    return [each.ds_tensor.clone() for each in engine.deepspeed.module.parameters()]


def run_case(run: Prepared, device: torch.device) -> dict[str, Any]:
    """Train one case."""
    engine, loop = start(run, device)
    saved: dict[str, Any] = {"initial": full_tensors(engine), "gradients": {}, "state": [], "ticks": []}
    step, restored, still = engine.deepspeed.step, [], []
    before = seen(engine)
    trained = [each.requires_grad for each in engine.deepspeed.module.parameters()]

    def keep_first_gradients() -> None:
        restored.append(all(map(torch.equal, before, seen(engine))))
        if not saved["gradients"]:
            saved["gradients"] = {
                n: safe_get_full_grad(each).float().clone()
                for n, each in engine.deepspeed.module.named_parameters()
                if each.requires_grad
            }
        step()

    engine.deepspeed.step = keep_first_gradients
    norms, gathers = [], []
    while loop.step < run.steps:
        GATHERS.clear()
        norms.append(loop.train_step())
        gathers.append((len(GATHERS), sum(GATHERS)))
        loop._log_training(norms[-1])
        now = seen(engine)
        still.append(all(torch.equal(b, n) for b, n, t in zip(before, now, trained, strict=True) if not t))
        before[:] = now
        saved["state"].append(run.method.state())
        saved["ticks"].append((engine.deepspeed.global_steps, engine.deepspeed.lr_scheduler.last_epoch))
    # On any rank.
    flags = torch.tensor([restored, still], dtype=torch.int32)
    torch.distributed.all_reduce(flags, torch.distributed.ReduceOp.MIN)
    states: list[Any] = [None] * here.size
    torch.distributed.all_gather_object(states, saved["state"])
    saved |= {"restored": bool(flags[0].all()), "still": bool(flags[1].all())}
    saved["same_state"] = all(each == states[0] for each in states)
    saved |= {"final": full_tensors(engine), "norms": norms, "gathers": gathers}
    engine.deepspeed.destroy()
    return saved


def main() -> None:
    """Run all cases in one process group."""
    cases, out = json.loads(Path(sys.argv[1]).read_text()), Path(sys.argv[2])
    nvtx.enable_nvtx = False  # marks for a profiler, around every function
    device = initialize_process_group(here)
    count_gathers()
    runs = {name: prepared(case["argv"], here) for name, case in cases.items()}
    gc.collect()
    gc.freeze()  # DeepSpeed collects garbage in each case, and would look through all modules each time
    for name, run in runs.items():
        with broken(cases[name].get("broken")):
            saved = run_case(run, device)
        if here.main:
            torch.save(saved, out / f"{name}.pt")
    end_rank(here)


if __name__ == "__main__":
    main()
