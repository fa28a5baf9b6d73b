"""One rank of a ZeRO-3 run: trains the cases of a JSON file with the product's own code and saves what the tests
compare.

cases: {name: {"argv": [...], "detach_lse": bool}}; written by rank 0 to OUT/name.pt: initial and final trainable
tensors, the first step's gradients, each step's gradient norm, and each step's parameter all-gathers with the elements
they gathered.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch

from pipeline.config import DataArguments, LoraArguments, ModelArguments, TrainArguments, parse, peek
from pipeline.methods import load_method
from pipeline.training.distributed import initialize_process_group, world

here = world()
import deepspeed  # noqa: E402
from deepspeed.utils import safe_get_full_grad  # noqa: E402

from pipeline.sink import column, injection  # noqa: E402
from pipeline.training.preflight import prepare  # noqa: E402
from pipeline.training.prepared import Prepared  # noqa: E402
from pipeline.training.run import start  # noqa: E402

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


def detached_lse_gradient(
    q: Any, k: Any, log_p: Any, grad_p: Any, segments: Any, position: int, scoring: Any, attend: Any
) -> Any:
    """The wrong gradient that a kernel's dropped LSE gradient leaves: only the numerator's."""
    c = (scoring.scale * grad_p * log_p.exp()).transpose(0, 1)
    grad_q, grad_k = torch.zeros_like(q), torch.zeros_like(k)
    group = q.shape[1] // k.shape[1]
    for first, end in segments.spans:
        sink = first + position
        k_s = k[sink].repeat_interleave(group, dim=0)
        grad_q[first:end] = c[first:end, :, None] * k_s
        grad_k[sink] = (c[first:end, :, None] * q[first:end]).sum(0).view(k.shape[1], group, -1).sum(1)
    return grad_q, grad_k


def prepared(argv: list[str]) -> Prepared:
    """A case, resolved as the door resolves it."""
    name = peek("method", argv) or "surgery"
    method = load_method(name)
    parsed = parse(
        [ModelArguments, DataArguments, LoraArguments, TrainArguments, method.Config], argv, description="test"
    )
    return prepare(parsed, name, method(parsed[method.Config]), here)


def run_case(run: Prepared, device: torch.device, detach_lse: bool) -> dict[str, Any]:
    """Train one case."""
    injection.sink_gradient = detached_lse_gradient if detach_lse else column.sink_gradient
    engine, loop = start(run, device)
    saved: dict[str, Any] = {"initial": full_tensors(engine), "gradients": {}}
    step = engine.deepspeed.step

    def keep_first_gradients() -> None:
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
    saved |= {"final": full_tensors(engine), "norms": norms, "gathers": gathers}
    engine.deepspeed.destroy()
    return saved


def main() -> None:
    """Run all cases in one process group."""
    cases, out = json.loads(Path(sys.argv[1]).read_text()), Path(sys.argv[2])
    device = initialize_process_group(here)
    count_gathers()
    runs = {name: prepared(case["argv"]) for name, case in cases.items()}
    for name, run in runs.items():
        saved = run_case(run, device, cases[name].get("detach_lse", False))
        if here.main:
            torch.save(saved, out / f"{name}.pt")
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
