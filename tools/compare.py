"""Models in one table: `python tools/compare.py --rows "Aligned=DIR" "SFT=assess:DIR;run:DIR" --output_dir OUT`."""

import sys
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parents[1])

import argparse  # noqa: E402

from pipeline.door import run_door  # noqa: E402
from pipeline.report.comparison import read_rows  # noqa: E402
from pipeline.report.page import write_report  # noqa: E402
from pipeline.report.poison import write_poison_sweep  # noqa: E402
from pipeline.report.positive_heads import write_hypothesis  # noqa: E402
from pipeline.report.scores import write_scores  # noqa: E402
from pipeline.report.table import write_table  # noqa: E402


def main() -> None:
    """Parse, call, print the table."""
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument(
        "--rows",
        nargs="+",
        required=True,
        metavar="NAME=assess:DIR[,DIR];sinks:DIR[,DIR];run:DIR[,DIR];match:DIR[,DIR]",
        help="a model and the folders of its stages; several folders are seeds; only assess: is needed; names that "
        "end in a ratio, such as 'SFT, 5 %%' or 'SFT, lr 1e-4, 5 %%', are points of a sweep",
    )
    parser.add_argument(
        "--output_dir",
        type=Path,
        required=True,
        help="folder for report.html, report.md, table.md, table.json; of two rows or more, scores.png, and if they "
        "are measured, hypothesis.png; of a sweep, poison_sweep.png instead of scores.png",
    )
    arguments = parser.parse_args()
    rows = read_rows(arguments.rows)
    print(write_table(rows, arguments.output_dir), end="")
    write_hypothesis(rows, arguments.output_dir)
    write_scores(rows, arguments.output_dir)
    write_poison_sweep(rows, arguments.output_dir)
    write_report(rows, arguments.output_dir)


if __name__ == "__main__":
    run_door(main)
