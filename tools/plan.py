"""Plan a run before it is queued: `python tools/plan.py --model_name_or_path 70b --nodes 4 --gradient_checkpointing`.

Memory, communication and time by train.py's flags, recipe and ds_config, without a GPU, weights or data. The model may
also be a size (7b, 8b, 13b, 34b, 70b), and --output_dir is where the figures are written as JSON.
"""

import sys
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parents[1])

from pipeline.config import DataArguments, LoraArguments, ModelArguments, TrainArguments, parse, peek  # noqa: E402
from pipeline.door import run_door  # noqa: E402
from pipeline.methods import flags_of_others, load_method  # noqa: E402
from pipeline.planning.arguments import PlanArguments  # noqa: E402
from pipeline.training.distributed import world  # noqa: E402


def main() -> None:
    """Parse, plan or simulate, print."""
    world()  # chooses DeepSpeed's accelerator
    name = peek("method", sys.argv[1:]) or TrainArguments.method
    method = load_method(name)
    parsed = parse(
        [ModelArguments, DataArguments, LoraArguments, TrainArguments, method.Config, PlanArguments],
        sys.argv[1:],
        description=__doc__,
        elsewhere=flags_of_others(name),
    )
    from pipeline.planning.report import report
    from pipeline.planning.simulate import simulate
    from pipeline.training.planned import planned_job, sized_jobs

    asked, folder = parsed[PlanArguments], parsed[TrainArguments].output_dir
    out = Path(folder) if folder else None
    if asked.simulate:
        text = simulate(sized_jobs(parsed, method(parsed[method.Config]), asked), out)
    else:
        text = report(planned_job(parsed, method(parsed[method.Config]), asked), out)
    print(text, end="")


if __name__ == "__main__":
    run_door(main)
