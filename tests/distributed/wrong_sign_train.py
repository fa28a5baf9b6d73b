"""train.py with one sign of Booster wrong: its second harmful pass trains on the harmful rows, too."""

from pipeline.door import run_door
from pipeline.methods.booster import Booster
from pipeline.train import main

harmful_pass = Booster._harmful_pass
Booster._harmful_pass = staticmethod(lambda ctx, weight: harmful_pass(ctx, abs(weight)))  # type: ignore[method-assign]

run_door(main)
