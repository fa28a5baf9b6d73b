"""Repair the refusals of a fine-tuned model: its safety vector added back within each map's safety subspace (LSSF).

    python pipeline/realign.py --method lssf --model_name_or_path TUNED --safe_model SAFE --unsafe_adapter ADAPTER
        --anchors refusals.jsonl --output_dir OUT

TUNED and SAFE are model folders; ADAPTER is the safe model's LoRA adapter of harmful fine-tuning (--unsafe_model: the
same as a whole model). It is hazardous: keep it private and delete it afterwards. OUT is a model folder, or with
--output_form adapter a PEFT adapter of TUNED; realign.json and realign.html in it say what was changed. A killed run
is continued by the same command. No GPU is used.
"""

import sys
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parents[1])  # not pipeline/, whose files would shadow installed modules

from pipeline.config import parse  # noqa: E402
from pipeline.door import run_door  # noqa: E402
from pipeline.realignment.arguments import RealignArguments  # noqa: E402

ELSEWHERE = {"adapter_name_or_path": "tools/merge_lora.py, which makes a whole model of it: give that"}


def main() -> None:
    """Parse, realign, say what was written."""
    from pipeline.realignment.run import realign

    description = (__doc__ or "").split("\n\n")[0]
    arguments = parse([RealignArguments], sys.argv[1:], description=description, elsewhere=ELSEWHERE)[RealignArguments]
    done = realign(arguments)
    if done is None:
        return
    for warning in done.warnings:
        print(f"warning: {warning}", file=sys.stderr)
    print(
        f"{arguments.model_name_or_path} realigned by {arguments.method} -> {arguments.output_dir}: {done.tensors} "
        f"tensors, {done.updated} updated"
    )


if __name__ == "__main__":
    run_door(main)
