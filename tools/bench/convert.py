"""Memory and time of a conversion: `python tools/bench/convert.py --output conversion.json`.

Writes synthetic ZeRO-3 checkpoints of several sizes and numbers of ranks in a temporary folder, one at a time, or
takes --checkpoint, and converts each with tools/zero_to_hf.py's converter and with DeepSpeed's zero_to_fp32, each time
in a process of its own, in turn (A B B A). Memory is the peak resident set with mapped file pages; time ends when the
files are on the disk.
"""

import sys
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parents[2])

import itertools  # noqa: E402
import json  # noqa: E402
import shutil  # noqa: E402
import subprocess  # noqa: E402
from collections.abc import Iterator, Mapping  # noqa: E402
from dataclasses import asdict, dataclass, field  # noqa: E402
from functools import partial  # noqa: E402
from tempfile import TemporaryDirectory  # noqa: E402
from typing import Any  # noqa: E402

from pipeline.config import Problems, parse  # noqa: E402
from pipeline.door import run_door  # noqa: E402
from tools.bench import report  # noqa: E402
from tools.bench.timing import interleave, quartiles, ratio  # noqa: E402

WAYS = ("ours", "zero_to_fp32")
DTYPES = {"fp32": 4, "bf16": 2, "fp16": 2}  # bytes
GB = 10**9


@dataclass
class ConvertArguments:
    """Flags of the conversion benchmark."""

    sizes: list[float] = field(
        default_factory=lambda: [0.1, 0.5, 1.5], metadata={"help": "Parameters of the synthetic models, in billions."}
    )
    ranks: list[int] = field(default_factory=lambda: [2, 8], metadata={"help": "Ranks that wrote the shards."})
    dtypes: list[str] = field(default_factory=lambda: ["fp32", "bf16"], metadata={"help": "Of the weights written."})
    checkpoint: str | None = field(default=None, metadata={"help": "A ZeRO checkpoint to convert in their place."})
    repeats: int = field(default=2, metadata={"help": "Conversions each way."})
    scratch: str | None = field(default=None, metadata={"help": "Folder for checkpoints and results, later removed."})
    output: str | None = field(default=None, metadata={"help": "JSON file to write."})

    def __post_init__(self) -> None:
        problems = [f"--sizes {size}: give more than 0" for size in self.sizes if size <= 0]
        problems += [f"--ranks {ranks}: give 1 or more" for ranks in self.ranks if ranks < 1]
        problems += [f"--dtypes {dtype}: choose fp32, bf16 or fp16" for dtype in self.dtypes if dtype not in DTYPES]
        if self.repeats < 1:
            problems.append(f"--repeats {self.repeats}: give 1 or more")
        if problems:
            raise Problems(problems)


def main() -> None:
    """Parse, convert, print the table and write the JSON."""
    arguments = parse([ConvertArguments], sys.argv[1:], description=__doc__)[ConvertArguments]

    import torch

    found = report.header(torch.device("cpu"), asdict(arguments))
    print(report.describe(found), flush=True)
    with TemporaryDirectory(dir=arguments.scratch) as folder:
        found["conversions"] = []
        for case, checkpoint in _cases(arguments, Path(folder)):
            for dtype in arguments.dtypes:
                found["conversions"].append(_convert(case, checkpoint, Path(folder) / "out", dtype, arguments.repeats))
                print(_table(found["conversions"][-1:]).splitlines()[-1], flush=True)
                report.save(found, arguments.output)
    print(f"\n{_table(found['conversions'])}", flush=True)


def _cases(arguments: ConvertArguments, scratch: Path) -> Iterator[tuple[dict[str, Any], Path]]:
    """What is converted: its description, and its folder, which is there until the next one is asked for."""
    from transformers import AutoConfig

    from tools.bench.synthetic_zero3 import llama_config, shapes_of, write_checkpoint

    if arguments.checkpoint is not None:
        config = AutoConfig.from_pretrained(arguments.checkpoint)
        yield _describe(shapes_of(config), None), Path(arguments.checkpoint)
        return
    for size, ranks in itertools.product(arguments.sizes, arguments.ranks):
        config = llama_config(size * 1e9)
        case = _describe(shapes_of(config), ranks)
        needed = case["parameters"] * (4 + max(DTYPES[dtype] for dtype in arguments.dtypes))
        if needed > 0.9 * shutil.disk_usage(scratch).free:
            raise ValueError(f"--sizes {size}: {scratch} has no room for {needed / GB:.0f} GB: use --scratch")
        checkpoint = write_checkpoint(scratch / "checkpoint-1", config, ranks)
        yield case, checkpoint
        shutil.rmtree(checkpoint)


def _describe(shapes: Mapping[str, Any], ranks: int | None) -> dict[str, Any]:
    numels = [shape.numel() for shape in shapes.values()]
    return {"parameters": sum(numels), "ranks": ranks, "largest_tensor_bytes": 4 * max(numels)}


def _run(way: str, checkpoint: Path, out: Path, dtype: str) -> dict[str, float]:
    command = [sys.executable, Path(__file__).with_name("one_conversion.py"), way, checkpoint, out, dtype]
    done = subprocess.run([*map(str, command)], capture_output=True, text=True, check=False)
    shutil.rmtree(out, ignore_errors=True)
    if done.returncode:
        raise ValueError(f"{way} of {checkpoint} failed: {done.stderr[-2000:]}")
    measured: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return measured


def _convert(case: dict[str, Any], checkpoint: Path, out: Path, dtype: str, repeats: int) -> dict[str, Any]:
    """Every way of converting one checkpoint, in turn."""
    ways = {way: partial(_run, way, checkpoint, out, dtype) for way in WAYS}
    measured = interleave(ways, repeats, warmup=0)
    bound = GB + case["largest_tensor_bytes"]
    found = case | {"dtype": dtype, "bound_bytes": bound}
    for way, runs in measured.items():
        found[way] = {
            "seconds": [each["seconds"] for each in runs],
            "peak_bytes": max(each["peak_bytes"] for each in runs),
        }
    found["seconds_ratio"] = ratio(*(found[way]["seconds"] for way in WAYS))._asdict()
    found["within_bound"] = found["ours"]["peak_bytes"] <= bound
    return found


def _table(conversions: list[dict[str, Any]]) -> str:
    head = ["parameters", "ranks", "dtype", "largest tensor", "bound", "peak: ours", "zero_to_fp32"]
    lines = [[*head, "seconds: ours", "zero_to_fp32", "ours / zero_to_fp32"]]
    for each in conversions:
        ways = [each[way] for way in WAYS]
        sizes = [each["largest_tensor_bytes"], each["bound_bytes"], *(way["peak_bytes"] for way in ways)]
        lines.append([
            f"{each['parameters'] / 1e9:.2f}B", str(each["ranks"] or ""), each["dtype"],
            *(f"{size / GB:.2f} GB" for size in sizes),
            *(f"{quartiles(way['seconds']).median:.1f}" for way in ways), f"{each['seconds_ratio']['median']:.2f}",
        ])  # fmt: skip
    kept = "in every conversion" if all(each["within_bound"] for each in conversions) else "NOT in every conversion"
    title = f"Conversions to safetensors. Ours stays within 1 GB and the largest tensor {kept}:"
    return "\n".join([title, "", report.table(lines)])


if __name__ == "__main__":
    run_door(main)
