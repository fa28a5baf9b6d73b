"""Check what is on disk, be it a checkpoint, a run, a model folder or an adapter: `verify_checkpoint.py PATH`.

Exit code 0: good; 1: incomplete or damaged, or other logits than --against; 2: it could not be checked.
"""

import sys
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parents[1])

import argparse  # noqa: E402
import json  # noqa: E402
from dataclasses import asdict  # noqa: E402

from pipeline.checkpoints.logits import TOLERANCE, compare_logits  # noqa: E402
from pipeline.checkpoints.tensor_stats import table  # noqa: E402
from pipeline.checkpoints.verify import Report, verify  # noqa: E402
from pipeline.door import run_door  # noqa: E402


def main() -> None:
    """Parse, check, say what was found."""
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("path", type=Path, metavar="PATH", help="checkpoint-N, a run, a model folder or an adapter")
    parser.add_argument("--all", action="store_true", help="show every tensor, not only the largest and smallest")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write everything that was found to FILE")
    parser.add_argument(
        "--against", metavar="MODEL", help="live model (folder, adapter, checkpoint) to hold logits against"
    )
    parser.add_argument(
        "--tolerance", type=float, default=TOLERANCE, help=f"of the largest logit [default: {TOLERANCE:g}]"
    )
    arguments = parser.parse_args()
    reports = verify(arguments.path)
    if arguments.json:
        write_json(arguments.json, reports)
    for report in reports:
        show(report, shown=None if arguments.all else 5)
    good = not any(report.problems for report in reports)
    if arguments.against and good:
        logits = compare_logits(arguments.path, arguments.against)
        good = logits.relative <= arguments.tolerance
        verdict = f"{'within' if good else 'ABOVE'} the tolerance {arguments.tolerance:g}"
        print(
            f"logits: max |difference| {logits.difference:.3g} from {arguments.against} rounded to {logits.rounded}, "
            f"{logits.relative:.2g} of the largest logit: {verdict}"
        )
    sys.exit(0 if good else 1)


def write_json(path: Path, reports: list[Report]) -> None:
    """Everything in one file."""
    found = [asdict(report) | {"folder": str(report.folder)} for report in reports]
    try:
        path.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    except OSError as error:
        raise ValueError(f"--json {path}: cannot be written: {error.strerror}") from error


def show(report: Report, *, shown: int | None) -> None:
    """One folder on the screen."""
    print(f"{report.folder}: {'DAMAGED OR INCOMPLETE' if report.problems else 'good'}")
    for line in (*report.facts, *(f"problem: {each}" for each in report.problems)):
        print(f"  {line}")
    for line in table(report.tensors, shown=shown) if report.tensors else ():
        print(f"  {line}")


if __name__ == "__main__":
    run_door(main)
