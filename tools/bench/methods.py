"""What a step of every training method costs beside a step of SFT: `python tools/bench/methods.py`.

All are steps of one ZeRO-3 engine, taken by the product's own loop over rows of one length, interleaved (A B C C B A)
in one process of one rank; each method at its defaults, but for TAR's inner loop. Two kinds of memory: what the passes
hold at their peak, and what a method keeps from step to step beside weights, gradients and optimizer.
"""

import sys
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parents[2])

from dataclasses import asdict, dataclass, field  # noqa: E402
from statistics import median  # noqa: E402
from tempfile import TemporaryDirectory  # noqa: E402
from typing import Any  # noqa: E402

from pipeline.config import Problems, out_of_range, parse  # noqa: E402
from pipeline.door import run_door  # noqa: E402
from tools.bench import report  # noqa: E402
from tools.bench.arguments import StepArguments  # noqa: E402

MIB = 2**20


@dataclass
class MethodsArguments(StepArguments):
    """Flags of the methods' benchmark."""

    layers: int | None = field(
        default=None, metadata={"help": "Keep the model's first N layers. [default: all of them]"}
    )
    texts: int = field(default=8, metadata={"help": "Rows of a batch, of every pool a method reads."})
    tokens: int = field(default=128, metadata={"help": "Tokens of every row."})
    inner_steps: int = field(default=4, metadata={"help": "TAR's --inner_steps; its paper has 64."})
    lora_r: int = field(default=0, metadata={"help": "Rank of an adapter on all linear layers; 0 trains the model."})
    repeats: int = field(default=4, metadata={"help": "Steps of each method, after one that is thrown away."})

    def __post_init__(self) -> None:
        problems = out_of_range(self, ("texts", "repeats", "layers", "inner_steps"), 1)
        problems += out_of_range(self, ("tokens",), 64) + out_of_range(self, ("lora_r",), 0)
        if problems:
            raise Problems(problems)


def main() -> None:
    """Parse, measure, print the table and write the JSON."""
    report.choose_device(sys.argv[1:])
    arguments = parse([MethodsArguments], sys.argv[1:], description=__doc__)[MethodsArguments]

    import torch.distributed as dist

    from pipeline.training.distributed import initialize_process_group, world
    from tools.bench.layouts import cut_model, model_config
    from tools.bench.method_steps import measure

    here = world()
    if here.size > 1:
        raise ValueError(f"methods.py compares steps of one rank, and was started on {here.size}: run it with python")
    device = initialize_process_group(here)
    bf16 = arguments.half(device)
    found = report.header(device, asdict(arguments) | {"bf16": bf16})
    print(report.describe(found), flush=True)
    with TemporaryDirectory() as folder:
        model = cut_model(arguments.model_name_or_path, arguments.layers, Path(folder))
        layers = model_config(model).get_text_config().num_hidden_layers
        found["methods"] = measure(arguments, model, bf16, Path(folder), here, device)
    found["settings"]["layers"] = layers
    print(f"\n{_table(found)}", flush=True)
    report.save(found, arguments.output)
    dist.destroy_process_group()


def _table(found: dict[str, Any]) -> str:
    lines = [["method", "step s", "x SFT", "passes x SFT", "peak MiB", "kept MiB"]]
    for name, each in found["methods"].items():
        ratios = {
            kind: f"{spread['median']:.2f} [{spread['low']:.2f}, {spread['high']:.2f}]"
            for kind, spread in each["ratio"].items()
        }
        memory = [f"{each[kind] / MIB:.0f}" for kind in ("peak_bytes", "kept_bytes")]
        lines.append([name, f"{median(each['seconds']['step']):.3f}", ratios["step"], ratios["passes"], *memory])
    settings = found["settings"]
    trained = f"LoRA of rank {settings['lora_r']}" if settings["lora_r"] else "full-parameter"
    rows = f"{settings['texts']} rows of {settings['tokens']} tokens"
    title = (
        f"A step of each method, {settings['model_name_or_path']} ({settings['layers']} layers), "
        f"{'bf16' if settings['bf16'] else 'fp32'}, {trained}, {rows} "
        f"in every pool (TAR: {settings['inner_steps']} inner steps):"
    )
    return f"{title}\n\n{report.table(lines)}"


if __name__ == "__main__":
    run_door(main)
