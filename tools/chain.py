"""Run a recipe of stages: `python tools/chain.py pipeline/recipes/demo.yaml`. Run again, it goes on."""

import sys
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parents[1])

import argparse  # noqa: E402

from pipeline.chain.flags import check_flags  # noqa: E402
from pipeline.chain.process import Stopped  # noqa: E402
from pipeline.chain.recipe import load_recipe  # noqa: E402
from pipeline.chain.runner import StageFailed, clean, run_chain, show_plan  # noqa: E402
from pipeline.chain.slurm import begin, end, submit  # noqa: E402
from pipeline.chain.stages import expand  # noqa: E402
from pipeline.door import run_door  # noqa: E402


def main() -> None:
    """Parse, call, exit code: 1 for a stage that failed, 128 + signal when stopped by one."""
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("recipe", type=Path, metavar="RECIPE.yaml", help="its format: pipeline/chain/recipe.py")
    parser.add_argument("--output_dir", type=Path, help="the chain's folder [default: the recipe's output_dir]")
    parser.add_argument("--keep_models", action="store_true", help="keep the weights of attacked models")
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--dry_run", action="store_true", help="check everything, print the commands, run nothing")
    what.add_argument("--clean", action="store_true", help="remove the weights of attacked models now")
    what.add_argument(
        "--slurm", metavar="'SBATCH WORDS'", nargs="?", const="",
        help="submit a job for each stage, as in --slurm='-N2 --gpus-per-node=8'; the words decide the ranks",
    )  # fmt: skip
    what.add_argument("--begin", metavar="STAGE", help="for slurm/stage.sh: record the start, print the words to run")
    what.add_argument("--end", metavar="STAGE", help="for slurm/stage.sh: record that the stage has finished")
    arguments = parser.parse_args()
    if arguments.keep_models and (arguments.clean or arguments.dry_run):
        parser.error("--keep_models: not with --clean or --dry_run")
    recipe = load_recipe(arguments.recipe)
    # Resolved, so that a stage that goes on gets the very words it was started with, whatever folder the user is in.
    stages = expand(recipe, (arguments.output_dir or Path(recipe.output_dir)).resolve())
    if not (arguments.clean or arguments.begin or arguments.end):
        check_flags(stages)
    try:
        if arguments.dry_run:
            print(show_plan(stages))
        elif arguments.clean:
            clean(stages)
        elif arguments.slurm is not None:
            print("\n".join(submit(stages, arguments.recipe, arguments.slurm, keep_models=arguments.keep_models)))
        elif arguments.begin:
            sys.stdout.write("".join(f"{word}\0" for word in begin(stages, arguments.begin)))
        elif arguments.end:
            for name in end(stages, arguments.end, keep_models=arguments.keep_models):
                print(f"deleted the attacked weights of {name}: no stage left reads them")
        else:
            run_chain(stages, keep_models=arguments.keep_models)
    except StageFailed as failure:
        print(f"error: {failure}", file=sys.stderr)
        sys.exit(1)
    except Stopped as stop:
        print(f"{stop}; run the same command again to go on", file=sys.stderr)
        sys.exit(stop.exit_code)


if __name__ == "__main__":
    run_door(main)
