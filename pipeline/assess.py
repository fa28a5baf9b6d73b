"""Evaluate a model: `python pipeline/assess.py [PHASE] --model_name_or_path DIR --suites policy --output_dir OUT`.

PHASE: generate (model -> answers), judge (answers -> verdicts), report (verdicts -> results.json), each on any machine
that has OUT; without one, all three. `fetch --suites ...` fills the caches on a machine with a network.
"""

import sys
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parents[1])  # not pipeline/, whose files would shadow installed modules

from pipeline.config import ModelArguments, parse  # noqa: E402
from pipeline.door import run_door  # noqa: E402
from pipeline.evaluation.gate import GATE_FAILED, passed  # noqa: E402
from pipeline.evaluation.report_phase import summary  # noqa: E402
from pipeline.evaluation.run import PHASES, AssessArguments, Phase, assess  # noqa: E402


def main() -> None:
    """Parse, evaluate, print the scores; exit code 3 if a condition of --fail_if holds."""
    words = sys.argv[1:]
    # The deepspeed launcher puts --local_rank=N first.
    first = next((word for word in words if not word.startswith("--local_rank")), "")
    phase: Phase = next((each for each in PHASES if each == first), "all")
    if phase != "all":
        words.remove(phase)
    parsed = parse([ModelArguments, AssessArguments], words, description=(__doc__ or "").split("\n\n")[0])
    results = assess(parsed[ModelArguments], parsed[AssessArguments], phase)
    if results:
        print(summary(results))
        if not passed(results["gate"]):
            sys.exit(GATE_FAILED)


if __name__ == "__main__":
    run_door(main)
