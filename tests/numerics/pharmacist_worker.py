"""One rank of selector trainings: trains the cases of a JSON file, {name: argv}, with the product's own code and saves
what the tests compare to OUT/name.pt: the adapter and the toxic increment where they started, the increment when it
was trained and at the end, dF/dw of every step, losses, scores and cosines."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch

from pipeline.training.distributed import initialize_process_group, world

here = world()
import deepspeed  # noqa: E402

from pipeline.config import parse  # noqa: E402
from pipeline.curation import pharmacist, pharmacist_method  # noqa: E402
from pipeline.curation.pharmacist_increment import ToxicIncrement  # noqa: E402
from pipeline.curation.pharmacist_method import Pharmacist  # noqa: E402
from pipeline.curation.pharmacist_selector import Selector  # noqa: E402
from pipeline.curation.pharmacist_settings import PharmacistArguments, training_flags  # noqa: E402
from pipeline.training import engine as engines  # noqa: E402
from pipeline.training.preflight import prepare  # noqa: E402
from tests.ranks import end_rank  # noqa: E402

KEPT: dict[str, Any] = {}
build_engine = engines.build_engine


def build(run: Any, device: torch.device) -> Any:
    """The engine, with its adapter remembered."""
    engine = build_engine(run, device)
    KEPT["initial"] = {}
    for name, parameter in engine.deepspeed.module.named_parameters():
        if parameter.requires_grad:
            with deepspeed.zero.GatheredParameters([parameter]):
                KEPT["initial"][name] = parameter.detach().clone()
    return engine


class Increment(ToxicIncrement):
    """The increment, with its tensors remembered before and after its training."""

    def train(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        KEPT["down"] = [each.clone() for each in self.down]
        found = super().train(*args, **kwargs)
        KEPT["trained"] = [each.clone() for each in (*self.down, *self.up)]
        return found


class Watched(Selector):
    """The selector, with each step's dF/dw remembered."""

    def step(self, rows: torch.Tensor, of_weights: torch.Tensor) -> None:
        KEPT.setdefault("of_weights", []).append(of_weights.clone())
        super().step(rows, of_weights)


def run_case(argv: list[str], device: torch.device) -> dict[str, Any]:
    """Train one case."""
    KEPT.clear()
    parsed = parse(pharmacist.CONFIGS, argv, description="test")
    method = Pharmacist(parsed[PharmacistArguments])
    prepared = prepare(training_flags(parsed), "pharmacist", method, here)
    pharmacist.train(prepared, method, device)
    if method.toxic:
        tensors = [*method.increment.down, *method.increment.up]
        KEPT["toxic_gradients"] = [each.grad for each in tensors]
        KEPT["toxic_end"] = tensors
    kept = {"scores": method.selector.scores(), "weights": method.selector.weights(), "history": method.history}
    for name in ("first_losses", "last_losses", "cosines"):
        value = getattr(method, name)
        kept[name] = None if value is None else torch.from_numpy(value)
    return KEPT | kept | {"toxic": method.toxic}


def main() -> None:
    """Run all cases in one process group."""
    cases, out = json.loads(Path(sys.argv[1]).read_text()), Path(sys.argv[2])
    engines.build_engine = build
    pharmacist_method.ToxicIncrement, pharmacist_method.Selector = Increment, Watched
    device = initialize_process_group(here)
    for name, argv in cases.items():
        saved = run_case(argv, device)
        if here.main:
            torch.save(saved, out / f"{name}.pt")
    end_rank(here)


if __name__ == "__main__":
    main()
