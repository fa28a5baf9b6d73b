"""The sink's share of attention: `python tools/bench/kernel.py --tokens 8192`.

Times the forward and backward pass of one attention layer over one reference text, alone and with the sink gradient,
paired and interleaved in one process; attention_ways.py says what each way is. The share is what the sink adds, in
parts of the attention alone. Then the error of the sink's value in bf16.
"""

import sys
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parents[2])

from dataclasses import asdict, dataclass, field  # noqa: E402
from typing import Any  # noqa: E402

from pipeline.config import Problems, parse  # noqa: E402
from pipeline.door import run_door  # noqa: E402
from tools.bench import report  # noqa: E402
from tools.bench.arguments import BenchArguments  # noqa: E402


@dataclass
class KernelArguments(BenchArguments):
    """Flags of the kernel benchmark."""

    model_name_or_path: str = field(
        default="builtin",
        metadata={"help": "Whose heads: model folder or hub id, or 'builtin'; only its config is read."},
    )
    tokens: int | None = field(default=None, metadata={"help": "Of the text. [default: 8192 on CUDA, 2048 on CPU]"})
    repeats: int = field(default=20, metadata={"help": "Rounds of all ways, after two that are thrown away."})

    def __post_init__(self) -> None:
        problems = []
        if self.repeats < 1:
            problems.append(f"--repeats {self.repeats}: give 1 or more")
        if self.tokens is not None and self.tokens < 2:
            problems.append(f"--tokens {self.tokens}: give 2 or more, so that a query follows the sink")
        if problems:
            raise Problems(problems)


def main() -> None:
    """Parse, time, print the table and write the JSON."""
    report.choose_device(sys.argv[1:])
    arguments = parse([KernelArguments], sys.argv[1:], description=__doc__)[KernelArguments]

    import torch

    from pipeline.sink.backends import KERNELS, choose
    from tools.bench.attention_ways import Layer, Shape, shares
    from tools.bench.timing import interleave

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    bf16 = arguments.half(device)
    if arguments.attention not in ("auto", *KERNELS):
        raise ValueError(f"--attention {arguments.attention}: choose auto or one of {', '.join(KERNELS)}")
    kernel, reason = choose(arguments.attention, device.type, half=bf16)
    tokens = arguments.tokens or (8192 if device.type == "cuda" else 2048)
    shape = Shape.of(arguments.model_name_or_path, tokens)
    settings = asdict(arguments) | asdict(shape) | {"bf16": bf16, "kernel": kernel, "reason": reason}
    found = report.header(device, settings)
    print(report.describe(found), flush=True)
    layer = Layer(shape, kernel, device, torch.bfloat16 if bf16 else torch.float32)
    seconds = interleave(layer.ways(), arguments.repeats, warmup=2)
    found |= {"seconds": seconds, "sink_share": shares(seconds), "bf16_value_error": layer.bf16_error()}
    print(f"\n{_table(found)}", flush=True)
    report.save(found, arguments.output)


def _table(found: dict[str, Any]) -> str:
    settings = found["settings"]
    lines = [["way", "positive heads", "ms", "over attention", "over fused_plain"]]
    for way, seconds in found["seconds"].items():
        name, _, positive = way.partition(":")
        cells = [
            f"{each['median']:+.1%} [{each['low']:+.1%}, {each['high']:+.1%}]" if each else ""
            for each in (found["sink_share"][baseline].get(way) for baseline in ("attention", "fused_plain"))
        ]
        lines.append([name, positive, f"{1e3 * sorted(seconds)[len(seconds) // 2]:.2f}", *cells])
    notes = [
        f"- Largest error of a head's mean sink attention in bf16, against fp32: {found['bf16_value_error']:.1e}."
    ]
    if "fused_plain" not in found["seconds"]:
        notes.append("- The fused Triton kernel was not timed: it needs triton and a CUDA device of capability 8.0.")
    shape = (
        f"{settings['tokens']} tokens, {settings['heads']} query and {settings['groups']} key/value heads of "
        f"{settings['dim']}, {settings['kernel']}, {'bf16' if settings['bf16'] else 'fp32'}"
    )
    title = f"Forward and backward pass of one layer's attention, one reference of {shape}:"
    return "\n".join([title, "", report.table(lines), "", *notes])


if __name__ == "__main__":
    run_door(main)
