"""Say whether this machine is ready to train: `python tools/doctor.py`; or every node of a job, as one process a rank:
`srun python tools/doctor.py --distributed`. Exit code 0: ready, 1: not, 2: wrong usage."""

import sys
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parents[1])

import argparse  # noqa: E402
import os  # noqa: E402

from pipeline.doctor.job import examine_job  # noqa: E402
from pipeline.doctor.machine import REQUIRABLE, Options, examine_machine, node_name  # noqa: E402
from pipeline.doctor.report import Row, lines, ready, verdict, written  # noqa: E402
from pipeline.doctor.roll import place  # noqa: E402

CLEAR = "\r\x1b[K"  # back to the start of the terminal's line, and empty it


def examine_here(options: Options) -> int:
    """Print each finding as it comes, then the verdict; on a terminal, what is being looked at."""
    clear = CLEAR if sys.stdout.isatty() else ""
    rows = []

    def starting(name: str) -> None:
        if clear:
            print(f"{clear}{name} ...", end="", flush=True)

    for finding in examine_machine(options, starting):
        rows.append(Row(node_name(), None, finding))
        print(clear + "\n".join(lines(finding)), flush=True)
    print(f"{clear}\n{verdict(rows)}")
    return 0 if written(options.json, rows) and ready(rows) else 1


def main() -> None:
    """Parse, examine, write the JSON file, exit."""
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    add = parser.add_argument
    add("--output_dir", type=Path, default=Path("runs"), help="where runs are to go [default: runs]")
    add("--json", type=Path, help="a file for all findings")
    add("--require", nargs="+", choices=REQUIRABLE, default=[], help="what has to be there")
    add("--distributed", action="store_true", help="one process a rank, under srun, deepspeed or torchrun")
    add("--timeout", type=float, default=300.0, help="seconds to wait for ranks, imports, collectives [default: 300]")
    add("--local_rank", type=int, help=argparse.SUPPRESS)  # the deepspeed launcher adds it
    flags = parser.parse_args()
    if flags.timeout <= 0:
        parser.error(f"--timeout {flags.timeout:g}: give a number of seconds above 0")
    try:
        here = place(os.environ) if flags.distributed else None
    except ValueError as error:
        parser.error(str(error))
    if flags.json and not (here and here.rank) and not flags.json.absolute().parent.is_dir():
        parser.error(f"--json {flags.json}: there is no folder {flags.json.absolute().parent}")
    options = Options(flags.output_dir, frozenset(flags.require), flags.timeout, flags.json)
    sys.exit(examine_job(here, options) if here else examine_here(options))


if __name__ == "__main__":
    main()
