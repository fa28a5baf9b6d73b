"""Turn a ZeRO-3 checkpoint into a Hugging Face folder: `python tools/zero_to_hf.py CHECKPOINT OUT`."""

import sys
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parents[1])

import argparse  # noqa: E402

from pipeline.checkpoints.convert import DTYPES, convert  # noqa: E402
from pipeline.config import run_door  # noqa: E402


def main() -> None:
    """Parse, convert, say what was written."""
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("checkpoint", type=Path, metavar="CHECKPOINT", help="checkpoint-N, or a run (its newest one)")
    parser.add_argument("out", type=Path, metavar="OUT", help="the new folder, of a model or a PEFT adapter")
    parser.add_argument("--dtype", choices=DTYPES, default="bf16", help="of the weights [default: bf16]")
    parser.add_argument(
        "--allow_attacked_model", action="store_true", help="export a run that trained on --attack_data, for study"
    )
    arguments = parser.parse_args()
    used = convert(
        arguments.checkpoint,
        arguments.out,
        dtype=DTYPES[arguments.dtype],
        allow_attacked=arguments.allow_attacked_model,
    )
    print(f"{used} -> {arguments.out} ({arguments.dtype})")


if __name__ == "__main__":
    run_door(main)
