"""measure.py as a user types it: against eager attention, on ranks, over a run's checkpoints, and with mistakes."""

from __future__ import annotations

import json
import signal
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from pipeline.config import ModelArguments, parse
from pipeline.data.chat import ChatEncoder
from pipeline.data.schema import read_conversations
from pipeline.evaluation.sink_pass import TOKENS_A_PASS
from pipeline.evaluation.sinks import MeasureArguments, measure
from pipeline.training.distributed import World
from tests.numerics.cases import sharp_llama
from tests.ranks import ROOT, run_ranks
from tests.runs import write_assessment
from tests.tiny import chat_row, save_model_folder, write_jsonl

TEXTS = {"harmful": 21, "harmless": 18}


def run(*words: str | Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *map(str, words)], cwd=ROOT, capture_output=True, text=True, check=False, timeout=300
    )


def measured(out: Path, *words: str | Path) -> dict[str, Any]:
    """What the door does with these flags, in this process: it starts faster."""
    parsed = parse([ModelArguments, MeasureArguments], ["--output_dir", str(out), *map(str, words)], description="")
    measure(parsed[ModelArguments], parsed[MeasureArguments], World(0, 0, 1))
    found: dict[str, Any] = json.loads((out / "sinks.json").read_text())
    return found


def written(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Attention far from uniform: heads differ."""
    return save_model_folder(sharp_llama(), tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def pools(tmp_path_factory: pytest.TempPathFactory) -> list[str | Path]:
    """The data flags of texts that fill three forward passes: on two ranks, one is left without a text."""
    words: list[str | Path] = []
    for name, count in TEXTS.items():
        rows = [chat_row(f"{name} text {i}", "warm bread and a kite " * (7 * i % 19 + 30)) for i in range(count)]
        words += [f"--{name}_data", write_jsonl(tmp_path_factory.mktemp("data") / f"{name}.jsonl", rows)]
    return words


@pytest.fixture(scope="module")
def whole(model: Path, pools: list[str | Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One process, the model's folder."""
    out = tmp_path_factory.mktemp("whole")
    done = run("pipeline/measure.py", "--output_dir", out, "--model_name_or_path", model, *pools)
    assert done.returncode == 0, done.stderr
    assert "texts: 39/39" in done.stdout
    return out


@pytest.fixture(scope="module")
def eager(model: Path, pools: list[str | Path]) -> dict[str, torch.Tensor]:
    """a_lh of every text [texts,L,H] from eager attention, one text at a time."""
    reference = AutoModelForCausalLM.from_pretrained(model, attn_implementation="eager")
    encoder = ChatEncoder(AutoTokenizer.from_pretrained(model), max_length=512)
    found = {}
    for name, path in zip(TEXTS, pools[1::2], strict=True):
        each = []
        for row in read_conversations(str(path), flag="x"):
            ids = torch.tensor(encoder.encode(row).input_ids)[None]
            with torch.no_grad():
                attentions = reference(ids, output_attentions=True).attentions
            each.append(torch.stack([layer[0, :, 1:, 0].mean(-1) for layer in attentions]))
        found[name] = torch.stack(each)
    return found


def test_statistics_are_those_of_eager_attention(whole: Path, eager: dict[str, torch.Tensor]) -> None:
    found = json.loads((whole / "sinks.json").read_text())
    means = {name: values.mean(0) for name, values in eager.items()}
    wanted = means["harmful"] - means["harmless"]
    for name in ("harmful", "harmless"):
        torch.testing.assert_close(torch.tensor(found[f"{name}_mean"]), means[name], rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(torch.tensor(found["divergence"]), wanted, rtol=1e-3, atol=1e-6)
    assert found["positive_heads"] == pytest.approx((wanted > 0).float().mean().item())
    assert found["penalty"] == pytest.approx(wanted.relu().mean().item(), rel=1e-3)
    assert found["texts"] == {"harmful_data": 21, "harmless_data": 18}
    x, y = (values[:, 1, 2].tolist() for values in eager.values())
    error = (statistics.variance(x) / 21 + statistics.variance(y) / 18) ** 0.5
    assert found["standard_error"][1][2] == pytest.approx(error, rel=1e-3)
    assert found["pairs"] == 18
    assert found["positive_pairs"][1][2] == sum(a > b for a, b in zip(x, y, strict=False))


def test_single_texts_are_kept_for_other_statistics(whole: Path, eager: dict[str, torch.Tensor]) -> None:
    values = np.load(whole / "sinks_per_text.npz")
    for name, wanted in eager.items():
        torch.testing.assert_close(torch.from_numpy(values[name]), wanted, rtol=1e-4, atol=1e-6)
        assert values[f"{name}_ids"][3] == f"{name}.jsonl:4"


def test_what_is_written(whole: Path) -> None:
    assert written(whole) == ["heatmap.png", "sinks.html", "sinks.json", "sinks_per_text.npz"]


def test_two_ranks_with_sharded_weights_equal_one_process(
    whole: Path, model: Path, pools: list[str | Path], tmp_path: Path
) -> None:
    config = json.loads((ROOT / "ds_configs/z3_offload.json").read_text())
    config["zero_optimization"]["stage3_param_persistence_threshold"] = 0  # every parameter is sharded
    config["train_batch_size"] = 7  # fits no number of ranks, and is training's own
    (tmp_path / "z3.json").write_text(json.dumps(config))
    out = tmp_path / "out"
    words = ["--model_name_or_path", model, *pools, "--output_dir", out, "--ds_config", tmp_path / "z3.json"]
    outputs = run_ranks(ROOT / "pipeline/measure.py", *map(str, words), ranks=2, timeout=120)
    assert "positive heads" in outputs[0]
    assert "positive heads" not in outputs[1]
    one, two = (np.load(folder / "sinks_per_text.npz") for folder in (whole, out))
    for name in TEXTS:
        np.testing.assert_allclose(two[name], one[name], rtol=1e-5, atol=1e-7)
    found = [json.loads((folder / "sinks.json").read_text()) for folder in (whole, out)]
    assert found[0]["p_value"] == found[1]["p_value"]


def test_the_texts_of_these_tests_fill_an_odd_number_of_passes(model: Path, pools: list[str | Path]) -> None:
    encoder = ChatEncoder(AutoTokenizer.from_pretrained(model), max_length=512)
    tokens = sum(
        len(encoder.encode(row).input_ids) for path in pools[1::2] for row in read_conversations(str(path), flag="x")
    )
    assert 2 * TOKENS_A_PASS < tokens < 2.8 * TOKENS_A_PASS


@pytest.fixture(scope="module")
def trained(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Run folders `attacked` (full-parameter, on attack data) and `lora`, two checkpoints each."""
    out = tmp_path_factory.mktemp("runs")
    shared = ["--method", "sft", "--model_name_or_path", model, "--max_steps", "2", "--save_steps", "1"]
    shared += ["--learning_rate", "1e-2", "--per_device_train_batch_size", "4", "--cache_dir", out / "cache"]
    attack = ["--attack_data", "policy:attack[:4]", "--poison_ratio", "0.5", "--sample_num", "8"]
    for name, flags in (("attacked", attack), ("lora", ["--lora_r", "4", "--train_data", "policy:user[:8]"])):
        done = run("pipeline/train.py", *shared, *flags, "--output_dir", out / name)
        assert done.returncode == 0, done.stderr
    return out


FEW = ["--harmful_data", "policy:harmful[:3]", "--harmless_data", "policy:harmless[:3]"]


def test_a_run_is_measured_checkpoint_by_checkpoint_and_nothing_of_it_is_exported(
    trained: Path, tmp_path: Path
) -> None:
    assessed = [f"checkpoint-{step}={write_assessment(tmp_path / f'a{step}', harmful=step)}" for step in (1, 2)]
    found = measured(tmp_path / "run", "--model_name_or_path", trained / "attacked", *FEW, "--assessed", *assessed)
    assert [each["checkpoint"] for each in found["checkpoints"]] == ["checkpoint-1", "checkpoint-2"]
    assert [each["harmful_score"]["k"] for each in found["checkpoints"]] == [1, 2]
    assert found["divergence"] == found["checkpoints"][1]["divergence"]
    assert found["attacked"] is True
    assert written(tmp_path / "run") == [
        "heatmap.png", "hypothesis.png", "positive_heads.png", "sinks.html", "sinks.json",
        "sinks_per_text-checkpoint-1.npz", "sinks_per_text-checkpoint-2.npz",
    ]  # fmt: skip

    model = tmp_path / "model"
    exported = run(
        "tools/zero_to_hf.py", trained / "attacked/checkpoint-1", model, "--dtype", "fp32", "--allow_attacked_model"
    )
    assert exported.returncode == 0, exported.stderr
    # Into the same folder: pictures that this measurement has not are gone.
    alone = measured(tmp_path / "run", "--model_name_or_path", model, *FEW)
    assert alone["checkpoints"] == []
    assert alone["attacked"] is True
    np.testing.assert_allclose(alone["divergence"], found["checkpoints"][0]["divergence"], rtol=1e-5, atol=1e-8)
    assert np.abs(np.subtract(alone["divergence"], found["divergence"])).max() > 1e-5
    assert "hypothesis.png" not in written(tmp_path / "run")


def test_an_adapters_checkpoint_is_measured_on_its_base(trained: Path, model: Path, tmp_path: Path) -> None:
    """On two ranks too, with the base and the adapter sharded."""
    found = measured(tmp_path / "run", "--model_name_or_path", trained / "lora/checkpoint-2", *FEW)
    assert found["step"] == 2
    words = ["--model_name_or_path", trained / "lora", *FEW, "--output_dir", tmp_path / "ranks"]
    run_ranks(
        ROOT / "pipeline/measure.py", *map(str, words), "--ds_config", "ds_configs/z3.json", ranks=2, timeout=120
    )
    on_ranks = json.loads((tmp_path / "ranks/sinks.json").read_text())
    assert [each["step"] for each in on_ranks["checkpoints"]] == [1, 2]
    np.testing.assert_allclose(on_ranks["divergence"], found["divergence"], rtol=1e-5, atol=1e-8)
    assert not (tmp_path / "ranks/.scratch").exists()

    exported = run("tools/zero_to_hf.py", trained / "lora", tmp_path / "adapter", "--dtype", "fp32")
    assert exported.returncode == 0, exported.stderr
    words = ["--model_name_or_path", model, *FEW]
    adapted = measured(tmp_path / "adapted", *words, "--adapter_name_or_path", tmp_path / "adapter")
    base = measured(tmp_path / "base", *words)
    np.testing.assert_allclose(found["divergence"], adapted["divergence"], rtol=1e-5, atol=1e-8)
    assert np.abs(np.subtract(found["divergence"], base["divergence"])).max() > 1e-5


def test_a_measurement_that_is_asked_to_end_leaves_no_weights(trained: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    command = [sys.executable, "pipeline/measure.py", "--model_name_or_path", trained / "attacked", *FEW]
    with subprocess.Popen(
        [*map(str, command), "--output_dir", str(out)], cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    ) as process:
        deadline = time.monotonic() + 120
        while not (out / ".scratch/model").exists():
            assert process.poll() is None, "it ended before it could be stopped"
            assert time.monotonic() < deadline
            time.sleep(0.002)
        assert (out / ".scratch").stat().st_mode & 0o777 == 0o700
        process.send_signal(signal.SIGTERM)
        assert process.wait(timeout=60) == 128 + signal.SIGTERM
    assert written(out) == []


def test_every_mistake_is_named_before_a_weight_is_read(trained: Path, tmp_path: Path) -> None:
    short = write_jsonl(tmp_path / "short.jsonl", [chat_row("a", "b"), chat_row("a", "bread " * 90)])
    assessed = write_assessment(tmp_path / "assessed")
    lonely = write_jsonl(tmp_path / "1.jsonl", [chat_row("a", "b")])
    done = run(
        "pipeline/measure.py", "--output_dir", tmp_path / "out", "--model_name_or_path", trained / "attacked",
        "--harmful_data", tmp_path / "none.jsonl", "--harmless_data", lonely,
        "--max_texts", "1", "--adapter_name_or_path", "adapter", "--ds_config", "nowhere.json",
    )  # fmt: skip
    assert done.returncode == 2
    problems = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    wanted = (
        "--max_texts 1", "none.jsonl", "1.jsonl: 1 usable text", "--adapter_name_or_path adapter: ",
        "--ds_config nowhere.json: no such file",
    )  # fmt: skip
    assert len(problems) == len(wanted), done.stderr
    for part, problem in zip(wanted, problems, strict=True):
        assert part in problem
    done = run(
        "pipeline/measure.py", "--output_dir", tmp_path / "out", "--model_name_or_path", trained / "attacked",
        "--harmful_data", short, "--sink_token_position", "60",
        "--assessed", f"checkpoint-3={assessed}", "checkpoint-1", f"checkpoint-2={tmp_path}",
    )  # fmt: skip
    assert done.returncode == 2
    for part in (
        "--harmful_data: short.jsonl:1 has ", "--assessed checkpoint-1: expected", "did you mean checkpoint-2?",
        "results.json: no such file",
    ):  # fmt: skip
        assert part in done.stderr
    assert not (tmp_path / "out").exists()


def test_several_ranks_need_a_deepspeed_file(model: Path, tmp_path: Path) -> None:
    arguments = MeasureArguments(output_dir=str(tmp_path / "out"), max_texts=3)
    with pytest.raises(ValueError, match="--ds_config: 2 ranks were started"):
        measure(ModelArguments(str(model)), arguments, World(0, 0, 2))


def test_damaged_weights_are_named_and_nothing_is_written(model: Path, tmp_path: Path) -> None:
    broken = AutoModelForCausalLM.from_pretrained(model)
    with torch.no_grad():
        broken.model.layers[0].self_attn.q_proj.weight[0] = float("nan")
    save_model_folder(broken, tmp_path / "broken")
    done = run(
        "pipeline/measure.py", "--model_name_or_path", tmp_path / "broken", *FEW, "--output_dir", tmp_path / "o"
    )
    assert done.returncode == 2
    assert "is not finite (policy:harmful:1 first)" in done.stderr
    assert written(tmp_path / "o") == []
