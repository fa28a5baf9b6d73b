"""Which weights of attacked models a chain deletes when."""

from __future__ import annotations

from pathlib import Path

import yaml

from pipeline.chain.attacked import delete_unneeded
from pipeline.chain.recipe import load_recipe
from pipeline.chain.stages import expand
from pipeline.chain.state import ChainFolder, Record

TRAIN = {
    "ds_config": "ds_configs/z3.json", "method": "sft", "train_data": "policy:user[:9]",
    "attack_data": "policy:attack[:1]", "poison_ratio": "{ratio}",
}  # fmt: skip
EXPORT = {"checkpoint": "{attack}", "allow_attacked_model": True}


def test_a_stage_whose_name_begins_another_ones_takes_nothing_of_it_along(tmp_path: Path) -> None:
    """model-ratio0 is done with and model-ratio0.05 is not; a killed conversion of the first left its half and its
    lock."""
    stages = [{"name": "attack", "run": "train", "with": TRAIN}, {"name": "model", "run": "convert", "with": EXPORT}]
    recipe, out = tmp_path / "chain.yaml", tmp_path / "out"
    content = {"name": "t", "output_dir": str(out), "matrix": {"ratio": [0, 0.05]}, "stages": stages}
    recipe.write_text(yaml.safe_dump(content))
    expanded = expand(load_recipe(recipe), out)
    kept = [out / name for name in ("model-ratio0.05", ".model-ratio0.05.partial")]
    for folder in (out / "model-ratio0", out / ".model-ratio0.partial", *kept):
        folder.mkdir(parents=True)
    (out / ".chain").mkdir()
    (out / ".model-ratio0.lock").touch()
    records = {stage.name: Record(stage.name, stage.definition, {}, [], finished=True) for stage in expanded}
    deleted = delete_unneeded(expanded, {"attack-ratio0", "model-ratio0"}, records, ChainFolder(out))
    assert deleted == ["model-ratio0"]
    assert sorted(path for path in out.glob("*model*") if path.is_dir()) == sorted(kept)
