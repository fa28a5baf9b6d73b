"""What a Surgery step costs, beside an SFT step and beside the public code's way: `python tools/bench/step.py`.

Everything is paired and interleaved (A B B A ...) in one process of one rank, forward and backward passes and whole
steps both. Surgery and SFT are steps of one ZeRO-3 engine, taken by the product's own loop.

  layouts   Surgery / SFT against the bound of flops.py
  lengths   three eager passes / Surgery, one user text of N tokens and two references of N, 512 at most; peak memory
  memory    Surgery's peak above SFT's where every text has N tokens, and its straight line over N
  --trl     SFT's tokens per second beside those of TRL's SFTTrainer
"""

import sys
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parents[2])

from dataclasses import asdict, dataclass, field  # noqa: E402
from tempfile import TemporaryDirectory  # noqa: E402
from typing import Any  # noqa: E402

from pipeline.config import Problems, out_of_range, parse  # noqa: E402
from pipeline.door import run_door  # noqa: E402
from tools.bench import report, step_tables  # noqa: E402
from tools.bench.arguments import StepArguments  # noqa: E402
from tools.bench.layouts import Layout, Setting, cut_model, model_config  # noqa: E402
from tools.bench.trl_sft import check_trl  # noqa: E402

LENGTHS = (256, 512, 1024, 2048, 4096)
CUDA_LENGTH = 8192


@dataclass
class SurgeryArguments(StepArguments):
    """Flags of the step benchmark."""

    layers: int | None = field(
        default=None, metadata={"help": "Keep the model's first N layers. [default: all of them]"}
    )
    eager_layers: int = field(
        default=8,
        metadata={"help": "Layers of the model in the parts over lengths, so that eager attention fits. [default: 8]"},
    )
    layouts: list[str] = field(
        default_factory=lambda: ["8x512+2x512", "2x1024+2x512", "1x4096+2x512", "8x128+2x128"],
        metadata={
            "help": "User texts x tokens + reference texts x tokens; 'none' leaves this part out. "
            "[default: 8x512+2x512 2x1024+2x512 1x4096+2x512 8x128+2x128]"
        },
    )
    lengths: list[int] = field(
        default_factory=list,
        metadata={
            "help": "Tokens of a text in the parts over lengths; 0 leaves them out. "
            "[default: 256 512 1024 2048 4096, on CUDA 8192 too]"
        },
    )
    repeats: int = field(
        default=4, metadata={"help": "Pairs of steps a layout, after one that is thrown away. [default: 4]"}
    )
    alpha: float = field(default=300.0, metadata={"help": "Weight of Surgery's penalty. [default: 300]"})
    trl: bool = field(default=False, metadata={"help": "Compare SFT with TRL's SFTTrainer at each layout too."})

    def __post_init__(self) -> None:
        problems = out_of_range(self, ("repeats", "layers", "eager_layers"), 1)
        if self.lengths != [0] and min(self.lengths, default=64) < 64:
            problems.append(f"--lengths {min(self.lengths)}: give 64 or more, or 0 alone to leave these parts out")
        if problems:
            raise Problems(problems)


def main() -> None:
    """Parse, run the parts, print each part's table and write the JSON after each."""
    report.choose_device(sys.argv[1:])
    arguments = parse([SurgeryArguments], sys.argv[1:], description=__doc__)[SurgeryArguments]
    layouts = [Layout.parse(each) for each in arguments.layouts if each != "none"]
    if arguments.trl:
        check_trl()
        if not layouts:
            raise ValueError("--trl has no effect with --layouts none: leave it out")

    import torch.distributed as dist

    from pipeline.builtin_model import resolve_model
    from pipeline.training.distributed import initialize_process_group, world
    from tools.bench.steps import StepBench, memory_fits

    here = world()
    if here.size > 1:
        raise ValueError(f"step.py compares steps of one rank, and was started on {here.size}: run it with python")
    device = initialize_process_group(here)
    bf16 = arguments.half(device)
    whole = model_config(resolve_model(arguments.model_name_or_path)).get_text_config().num_hidden_layers
    layers = min(arguments.layers or whole, whole)
    eager_layers = min(arguments.eager_layers, whole)
    lengths = arguments.lengths or [*LENGTHS, *([CUDA_LENGTH] if device.type == "cuda" else [])]
    resolved = {
        "bf16": bf16, "layers": layers, "eager_layers": eager_layers, "model_layers": whole, "lengths": lengths,
    }  # fmt: skip
    found = report.header(device, asdict(arguments) | resolved)
    print(report.describe(found), flush=True)

    def show(part: str, value: Any) -> None:
        found[part] = value
        print(f"\n{step_tables.TABLES[part](found)}", flush=True)
        report.save(found, arguments.output)

    with TemporaryDirectory() as folder:

        def bench(kept: int) -> StepBench:
            model = cut_model(arguments.model_name_or_path, kept, Path(folder))
            rows = Path(folder) / "rows"
            setting = Setting(model, arguments.ds_config, bf16, arguments.attention, arguments.alpha, rows, here)
            return StepBench(setting, device, arguments.repeats)

        if layouts:
            with bench(layers) as cut:
                show("layouts", [cut.layout(each) for each in layouts])
                if arguments.trl:
                    show("trl", [cut.trl(each) for each in layouts])
        if lengths != [0]:
            with bench(eager_layers) as cut:
                show("lengths", cut.lengths(lengths))
                rows = cut.memory(lengths)
                show("memory", {"rows": rows, "fits": memory_fits(found["lengths"], rows)})
    dist.destroy_process_group()


if __name__ == "__main__":
    run_door(main)
