"""Turn a DeepSpeed checkpoint into a Hugging Face folder: `python tools/zero_to_hf.py CHECKPOINT OUT`.

ZeRO-1, 2 or 3; full-parameter, or LoRA, which becomes a PEFT adapter. One tensor at a time is in memory. If it is
interrupted, the same command continues it.
"""

import sys
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parents[1])

import argparse  # noqa: E402

from pipeline.checkpoints.convert import DTYPES, WORKERS, convert  # noqa: E402
from pipeline.door import run_door  # noqa: E402


def main() -> None:
    """Parse, convert, say what was written."""
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("checkpoint", type=Path, metavar="CHECKPOINT", help="checkpoint-N, or a run (its newest one)")
    parser.add_argument("out", type=Path, metavar="OUT", help="the new folder, of a model or a PEFT adapter")
    parser.add_argument("--dtype", choices=DTYPES, default="bf16", help="of the weights [default: bf16]")
    parser.add_argument("--max_shard_size", default="5GB", metavar="SIZE", help="of a file of weights [default: 5GB]")
    parser.add_argument(
        "--workers", type=int, default=WORKERS, metavar="N", help=f"files written at once [default: {WORKERS}]"
    )
    parser.add_argument(
        "--model_name_or_path",
        metavar="BASE",
        help="model folder or hub id, for what the checkpoint lacks of config and tokenizer",
    )
    parser.add_argument(
        "--allow_attacked_model", action="store_true", help="export a run that trained on --attack_data, for study"
    )
    arguments = parser.parse_args()
    used = convert(
        arguments.checkpoint,
        arguments.out,
        dtype=DTYPES[arguments.dtype],
        allow_attacked=arguments.allow_attacked_model,
        max_shard_size=arguments.max_shard_size,
        workers=arguments.workers,
        base=arguments.model_name_or_path,
    )
    print(f"{used} -> {arguments.out} ({arguments.dtype})")


if __name__ == "__main__":
    run_door(main)
