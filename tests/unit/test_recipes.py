"""Recipes of one training run; chains are held against their doors by tests/cli/test_chain.py."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from pipeline.config import DataArguments, LoraArguments, ModelArguments, TrainArguments, parse, peek
from pipeline.methods import load_method

RECIPES = Path(__file__).resolve().parents[2] / "pipeline/recipes"
SINGLE = [each for each in sorted(RECIPES.glob("*.yaml")) if "stages" not in yaml.safe_load(each.read_text("utf-8"))]


@pytest.mark.parametrize("path", SINGLE, ids=lambda path: path.stem)
def test_a_recipe_has_flags_and_values_that_train_has(path: Path) -> None:
    words = ["--config", str(path)]
    method = peek("method", words)
    assert method is not None
    groups = [ModelArguments, DataArguments, LoraArguments, TrainArguments, load_method(method).Config]
    parse(groups, words, description=path.name)
