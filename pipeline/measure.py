"""Measure attention sinks: `python pipeline/measure.py --model_name_or_path DIR --harmful_data S --harmless_data S
--output_dir OUT`."""

import sys
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parents[1])  # not pipeline/, whose files would shadow installed modules

from pipeline.config import ModelArguments, parse, run_door  # noqa: E402
from pipeline.evaluation.sinks import MeasureArguments, measure  # noqa: E402


def main() -> None:
    """Parse, measure, print the summary."""
    parsed = parse([ModelArguments, MeasureArguments], sys.argv[1:], description=__doc__)
    found = measure(parsed[ModelArguments], parsed[MeasureArguments])
    where = f"{parsed[MeasureArguments].output_dir}/sinks.json"
    print(f"positive heads {found['positive_heads']:.1%}  penalty {found['penalty']:.3e}  {where}")


if __name__ == "__main__":
    run_door(main)
