"""Evaluate a model: `python pipeline/assess.py --model_name_or_path DIR --suites policy --output_dir OUT`."""

import sys
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parents[1])  # not pipeline/, whose files would shadow installed modules

from pipeline.config import ModelArguments, parse, run_door  # noqa: E402
from pipeline.evaluation.gate import GATE_FAILED, passed  # noqa: E402
from pipeline.evaluation.run import AssessArguments, assess, summary  # noqa: E402


def main() -> None:
    """Parse, evaluate, print the scores; exit code 3 if a condition of --fail_if holds."""
    parsed = parse([ModelArguments, AssessArguments], sys.argv[1:], description=__doc__)
    results = assess(parsed[ModelArguments], parsed[AssessArguments])
    print(summary(results))
    if not passed(results["gate"]):
        sys.exit(GATE_FAILED)


if __name__ == "__main__":
    run_door(main)
