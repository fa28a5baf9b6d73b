"""Run a recipe of stages: `python tools/chain.py pipeline/recipes/demo.yaml`. Run again, it goes on."""

import sys
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parents[1])

import argparse  # noqa: E402

from pipeline.chain.flags import check_flags  # noqa: E402
from pipeline.chain.process import Stopped  # noqa: E402
from pipeline.chain.recipe import load_recipe  # noqa: E402
from pipeline.chain.runner import StageFailed, clean, run_chain, show_plan  # noqa: E402
from pipeline.chain.stages import expand  # noqa: E402
from pipeline.door import run_door  # noqa: E402


def main() -> None:
    """Parse, call, exit code: 1 for a stage that failed, 128 + signal when stopped by one."""
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("recipe", type=Path, metavar="RECIPE.yaml", help="its format: pipeline/chain/recipe.py")
    parser.add_argument("--output_dir", type=Path, help="the chain's folder [default: the recipe's output_dir]")
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--keep_models", action="store_true", help="keep the weights of attacked models")
    what.add_argument("--dry_run", action="store_true", help="check everything, print the commands, run nothing")
    what.add_argument("--clean", action="store_true", help="remove the weights of attacked models now")
    arguments = parser.parse_args()
    recipe = load_recipe(arguments.recipe)
    # Resolved, so that a stage that goes on gets the very words it was started with, whatever folder the user is in.
    stages = expand(recipe, (arguments.output_dir or Path(recipe.output_dir)).resolve())
    if not arguments.clean:
        check_flags(stages)
    try:
        if arguments.dry_run:
            print(show_plan(stages))
        elif arguments.clean:
            clean(stages)
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
