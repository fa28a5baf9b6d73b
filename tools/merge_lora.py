"""Add a LoRA adapter to its base model: `python tools/merge_lora.py BASE ADAPTER OUT`."""

import sys
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parents[1])

import argparse  # noqa: E402

from pipeline.checkpoints.convert import DTYPES  # noqa: E402
from pipeline.checkpoints.merge import merge  # noqa: E402
from pipeline.door import run_door  # noqa: E402


def main() -> None:
    """Parse, merge, say what was written and what rounding lost."""
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("base", metavar="BASE", help="model folder, 'builtin', or the id of a model in the hub cache")
    parser.add_argument("adapter", type=Path, metavar="ADAPTER", help="folder of a PEFT LoRA adapter")
    parser.add_argument("out", type=Path, metavar="OUT", help="the new model folder")
    parser.add_argument("--dtype", choices=DTYPES, help="of the weights [default: each tensor keeps the base's]")
    parser.add_argument("--max_shard_size", default="5GB", help="of a file [default: 5GB]")
    parser.add_argument("--workers", type=int, default=1, help="files written at once [default: 1]")
    parser.add_argument(
        "--allow_attacked_model", action="store_true", help="merge what was trained on --attack_data, for study"
    )
    arguments = parser.parse_args()
    merged = merge(
        arguments.base,
        arguments.adapter,
        arguments.out,
        dtype=DTYPES.get(arguments.dtype),
        max_shard_size=arguments.max_shard_size,
        workers=arguments.workers,
        allow_attacked=arguments.allow_attacked_model,
    )
    for warning in merged.warnings():
        print(f"warning: {warning}", file=sys.stderr)
    changed = f"{merged.updated} updated" + (f", {merged.replaced} replaced" if merged.replaced else "")
    print(f"{arguments.base} + {arguments.adapter} -> {arguments.out}: {merged.tensors} tensors, {changed}")


if __name__ == "__main__":
    run_door(main)
