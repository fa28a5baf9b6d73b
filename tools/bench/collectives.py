"""Collectives of a training step: `python tools/bench/collectives.py`, or on N ranks
`deepspeed --num_gpus N tools/bench/collectives.py`.

Counts the all-gathers (parameters) and reduce-scatters (gradients) that ZeRO-3 makes in one optimizer step of SFT and
of Surgery at the same packed length, and the elements they carry. Surgery's references ride in the same forward pass,
so the two must be equal.
"""

import sys
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parents[2])

from dataclasses import asdict, dataclass, field  # noqa: E402
from tempfile import TemporaryDirectory  # noqa: E402
from typing import Any  # noqa: E402

from pipeline.config import Problems, out_of_range, parse  # noqa: E402
from pipeline.door import run_door  # noqa: E402
from tools.bench import report  # noqa: E402
from tools.bench.arguments import StepArguments  # noqa: E402


@dataclass
class CollectivesArguments(StepArguments):
    """Flags of the collectives benchmark."""

    texts: int = field(default=2, metadata={"help": "User texts of a rank's Surgery step, beside its two references."})
    tokens: int = field(default=128, metadata={"help": "Of every text."})
    steps: int = field(default=2, metadata={"help": "Steps counted, after two in which ZeRO-3 learns the order."})

    def __post_init__(self) -> None:
        if problems := out_of_range(self, ("texts", "steps"), 1) + out_of_range(self, ("tokens",), 64):
            raise Problems(problems)


def main() -> None:
    """Parse, count, print the table and write the JSON (rank 0)."""
    report.choose_device(sys.argv[1:])
    arguments = parse([CollectivesArguments], sys.argv[1:], description=__doc__)[CollectivesArguments]

    from pipeline.builtin_model import resolve_model
    from pipeline.training.distributed import initialize_process_group, leave_process_group, world
    from tools.bench.counting import Counter, count_steps
    from tools.bench.layouts import Layout, Setting, resolve
    from tools.bench.steps import StepBench

    here = world()
    device = initialize_process_group(here)
    bf16 = arguments.half(device)
    counter = Counter()
    with TemporaryDirectory() as folder:
        setting = Setting(
            resolve_model(arguments.model_name_or_path), arguments.ds_config, bf16, arguments.attention, 300.0,
            Path(folder), here,
        )  # fmt: skip
        texts, tokens = arguments.texts, arguments.tokens
        runs = {
            "surgery": resolve(setting, Layout(texts, tokens, 2, tokens))["surgery"],
            "sft": resolve(setting, Layout(texts + 2, tokens, 2, tokens))["sft"],
        }
        with StepBench(setting, device, 1) as bench:
            counts = {name: count_steps(step, counter, arguments.steps) for name, step in bench.steps(runs).items()}
    leave_process_group(here)
    if not here.main:
        return
    found = report.header(device, asdict(arguments) | {"bf16": bf16, "ranks": here.size})
    found |= {"packed_tokens": (texts + 2) * tokens, "steps": counts, "equal": counts["surgery"] == counts["sft"]}
    print(f"{report.describe(found)}\n\n{_table(found)}", flush=True)
    report.save(found, arguments.output)


def _table(found: dict[str, Any]) -> str:
    lines = [["method", "all-gathers a step", "elements", "reduce-scatters a step", "elements"]]
    for name, steps in found["steps"].items():
        last = steps[-1]
        cells = [
            f"{last[kind][what]:,}" for kind in ("all_gather", "reduce_scatter") for what in ("calls", "elements")
        ]
        lines.append([name, *cells])
    equal = "equal" if found["equal"] else "NOT equal"
    settings = found["settings"]
    title = (
        f"Collectives of one rank of {settings['ranks']}, {settings['model_name_or_path']}, a packed row of "
        f"{found['packed_tokens']} tokens: {equal}"
    )
    return "\n".join([title, "", report.table(lines)])


if __name__ == "__main__":
    run_door(main)
