"""The control of a comparison: the checkpoint of RUN that has the loss of another run's end, or of another model."""

import sys
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parents[1])

import argparse  # noqa: E402

from pipeline.door import run_door  # noqa: E402
from pipeline.report.match import match_checkpoint  # noqa: E402


def main() -> None:
    """Parse, call, say what was found."""
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("run", type=Path, metavar="RUN", help="training run whose checkpoints are searched")
    parser.add_argument(
        "--like",
        type=Path,
        required=True,
        help="training run whose final value is the target, or an assessment with that loss (--loss_data)",
    )
    parser.add_argument("--metric", required=True, help="a metric that both evaluated, such as eval_poisoned_loss")
    parser.add_argument(
        "--output_dir", type=Path, required=True, help="folder for match.json and the link `checkpoint`"
    )
    arguments = parser.parse_args()
    print(match_checkpoint(arguments.run, arguments.like, arguments.metric, arguments.output_dir).sentence())


if __name__ == "__main__":
    run_door(main)
