"""ds_configs/z3_hpz.json: a second copy of the parameters inside every node changes where weights are gathered from,
not what is trained."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from tests.distributed.lives import Lives, metrics
from tests.ranks import ROOT

STEPS = ["--max_steps", "4", "--save_steps", "2"]


@pytest.mark.parametrize("kind", [[], ["--lora_r", "4"]], ids=["full", "lora"])
def test_hpz_trains_and_resumes_as_plain_zero_3(
    kind: list[str], server: Lives, flags: list[str], tmp_path: Path
) -> None:
    hpz = json.loads((ROOT / "ds_configs/z3_hpz.json").read_text())
    plain = json.loads((ROOT / "ds_configs/z3.json").read_text())
    assert hpz["zero_optimization"].pop("zero_hpz_partition_size") == 8
    assert hpz == plain
    hpz["zero_optimization"]["zero_hpz_partition_size"] = 2  # ranks of a node here
    runs = {}
    for name, config in (("plain", plain), ("hpz", hpz)):
        file, runs[name] = tmp_path / f"{name}.json", tmp_path / name
        file.write_text(json.dumps(config))
        argv = [*flags, *kind, *STEPS, "--ds_config", str(file), "--output_dir", str(runs[name])]
        server.run("pipeline/train.py", *argv, ranks=2, logs=tmp_path / "logs")
    used = json.loads((runs["hpz"] / "run.json").read_text())["ds_config"]
    assert used["zero_optimization"]["zero_hpz_partition_size"] == 2
    wanted = metrics(runs["hpz"])
    assert wanted == metrics(runs["plain"])
    assert len({line["loss"] for line in wanted}) == 4

    resumed = shutil.copytree(runs["hpz"], tmp_path / "resumed", ignore=shutil.ignore_patterns("checkpoint-4"))
    argv = [*flags, *kind, *STEPS, "--ds_config", str(tmp_path / "hpz.json"), "--output_dir", str(resumed)]
    output = server.run(
        "pipeline/train.py", *argv, "--resume_from_checkpoint", "auto", ranks=2, logs=tmp_path / "logs"
    )
    assert f"resumed from {resumed}/checkpoint-2" in output
    assert metrics(resumed) == wanted
