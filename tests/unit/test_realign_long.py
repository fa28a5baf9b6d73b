"""What shows only in processes of their own: a kill at any point, the memory of models of three sizes, the door."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from pipeline.checkpoints.checksums import check_manifest
from pipeline.realignment.anchors import Anchor, Anchors
from pipeline.realignment.maps import by_tensor, decoder_layers, linear_maps
from pipeline.realignment.plan import make_plan
from pipeline.realignment.run import realign
from tests.doors import ROOT, run
from tests.realign_models import arguments, make_models, report_of, small_llama
from tests.realign_models import run as realign_here
from tests.unit import realign_worker

GB, MIB = 10**9, 2**20


def worker(*words: str | Path) -> Any:
    done = subprocess.run(
        [sys.executable, realign_worker.__file__, *map(str, words)],
        cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True, check=False,
        timeout=200,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def test_a_kill_at_any_point_is_continued_to_the_same_files(tmp_path: Path) -> None:
    models = make_models(tmp_path / "models", targets=["q_proj", "down_proj"])
    realign_here(models, tmp_path / "straight", **realign_worker.SETTINGS)
    expected = {path.name: path.read_bytes() for path in (tmp_path / "straight").iterdir()}
    assert sum(name.endswith(".safetensors") for name in expected) > 3
    killed = worker("kills", models, tmp_path / "killed")
    assert len(killed) > 20  # files of subspaces, hidden states, outputs, weights, reports
    for folder in map(Path, killed):
        assert {path.name: path.read_bytes() for path in folder.iterdir()} == expected, folder.name
        check_manifest(folder)
        assert not list(folder.parent.glob(f".{folder.name}.*"))


def test_memory_is_flat_over_three_sizes_and_below_the_plan(tmp_path: Path) -> None:
    depths = (1, 4, 16)  # 4, 11 and 40 MB of fp32 weights in layers of 2.4 MB
    for depth in depths:
        make_models(tmp_path / str(depth), small_llama(depth, 256))
    (tmp_path / "out").mkdir()
    found = worker("memory", tmp_path / "out", *(tmp_path / str(depth) for depth in depths))
    peaks = [each["peak"] for each in found]
    assert max(peaks) - min(peaks) < 8 * MIB  # 34 MiB more of weights
    assert all(each["peak"] < each["plan"] for each in found)
    assert found[0]["plan"] == found[2]["plan"]


def test_70b_is_planned_below_16_gb() -> None:
    config = LlamaConfig(
        vocab_size=128256, hidden_size=8192, intermediate_size=28672, num_hidden_layers=1, num_attention_heads=64,
        num_key_value_heads=8,
    )  # fmt: skip
    with torch.device("meta"):
        model = LlamaForCausalLM(config)
    anchors = Anchors([Anchor(list(range(i, i + 300)), [j >= 200 for j in range(300)]) for i in range(128)], [])
    maps, _ = linear_maps(model, Path())
    plan = make_plan(decoder_layers(model, Path())[1], by_tensor(maps), anchors, workers=1)
    assert anchors.tokens == 12_800
    assert plan.layer > 4 * 855_650_304  # a layer's parameters in fp32
    assert 5 * GB < plan.peak < 16 * GB


def test_the_door_from_flags_to_the_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    models = make_models(tmp_path / "models")
    words = [
        "pipeline/realign.py", "--model_name_or_path", models / "tuned", "--safe_model", models / "safe",
        "--unsafe_adapter", models / "adapter", "--anchors", models / "anchors.jsonl", "--output_dir",
        tmp_path / "out",
    ]  # fmt: skip
    realign(arguments(models, tmp_path / "out", dry_run=True))
    assert capsys.readouterr().err.count("plan: host memory below") == 1
    assert not list(tmp_path.glob("*out*"))
    (models / "adapter").chmod(0o755)
    done = run(*words, "--eta", "0.8", "--dtype", "fp32")
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == (
        f"{models / 'tuned'} realigned by lssf -> {tmp_path / 'out'}: 21 tensors, 14 updated"
    )
    assert f"warning: {models / 'adapter'} is hazardous, and other users can read it" in done.stderr
    assert report_of(tmp_path / "out")["settings"]["eta"] == 0.8
    bad = run(*words, "--eta", "0.8", "--adapter_name_or_path", "X")
    assert bad.returncode == 2
    assert bad.stderr.splitlines()[-1].startswith(
        "error: --adapter_name_or_path is unknown here; it belongs to tools/merge_lora.py"
    )
