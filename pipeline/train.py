"""Train a model: `deepspeed pipeline/train.py --ds_config ds_configs/z3.json`, or plain `python` for one rank."""

import sys
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parents[1])  # not pipeline/, whose files would shadow installed modules

from pipeline.training import signals  # noqa: E402

signals.listen()  # before the imports below, which take seconds

from pipeline.config import DataArguments, LoraArguments, ModelArguments, TrainArguments, parse, peek  # noqa: E402
from pipeline.door import run_door  # noqa: E402
from pipeline.methods import flags_of_others, load_method  # noqa: E402
from pipeline.training.distributed import world  # noqa: E402


def main() -> None:
    """Parse, prepare, train."""
    here = world()
    name = peek("method", sys.argv[1:]) or TrainArguments.method
    method_class = load_method(name)
    parsed = parse(
        [ModelArguments, DataArguments, LoraArguments, TrainArguments, method_class.Config],
        sys.argv[1:],
        description=__doc__,
        elsewhere=flags_of_others(name),
    )
    from pipeline.training.preflight import prepare
    from pipeline.training.run import dry_run, execute

    run = prepare(parsed, name, method_class(parsed[method_class.Config]), here)
    if run.train.dry_run:
        if here.main:
            print(dry_run(run))
        return
    execute(run)


if __name__ == "__main__":
    run_door(main)
