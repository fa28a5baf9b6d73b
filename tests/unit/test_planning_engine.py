"""The planner against real ZeRO-3 engines on gloo ranks: states, gathered weights and saved activations.

Three sizes, full-parameter and LoRA, with and without checkpointing; DeepSpeed's bounds on what it keeps whole as the
product sets them, at zero, and between; a second shard in groups. Every combination of size, adapter and checkpointing
is held against a real step without DeepSpeed in test_planning_families.py.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from pipeline.planning.activations import Row, Subject
from pipeline.planning.description import shown
from pipeline.planning.states import ZeroSettings, states
from pipeline.training.forecast import expectation, forecast, outcome
from pipeline.training.meta_step import subject
from tests.cli.preflight import resolve
from tests.distributed.lives import Lives
from tests.ranks import ROOT
from tests.tiny import VOCAB_SIZE, chat_row, save_model_folder, write_jsonl

WORKER = ROOT / "tests/unit/planning_worker.py"
SIZES = {"small": (64, 2), "middle": (96, 3), "large": (160, 5)}  # hidden size, layers
BOUNDS: dict[str, dict[str, int]] = {
    "as_set": {},
    "nothing_kept": {
        "stage3_param_persistence_threshold": 0, "stage3_max_reuse_distance": 0, "stage3_max_live_parameters": 30_000,
        "stage3_prefetch_bucket_size": 9_000,
    },
    "some_kept": {"stage3_max_reuse_distance": 20_000, "stage3_prefetch_bucket_size": 20_000},
    "groups": {"zero_hpz_partition_size": 2, "stage3_max_reuse_distance": 0},
    "quantised": {"zero_quantized_weights": True},
}  # fmt: skip
ADAPTED, CHECKPOINTED = ["--lora_r", "3"], ["--gradient_checkpointing"]
ON_TWO = {
    "small-full": ("small", "as_set", []),
    "small-lora-checkpointed": ("small", "nothing_kept", [*ADAPTED, *CHECKPOINTED]),
    "middle-full-checkpointed": ("middle", "nothing_kept", CHECKPOINTED),
    "middle-lora": ("middle", "groups", ADAPTED),
    "large-full-checkpointed": ("large", "some_kept", CHECKPOINTED),
    "large-lora": ("large", "some_kept", ADAPTED),
}
ON_ONE = {"one-lora": ("middle", "nothing_kept", ADAPTED)}
Found = dict[str, tuple[dict[str, Any], ZeroSettings, Subject]]


@pytest.fixture(scope="module")
def material(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, str, list[str]], list[str]]:
    """The command line of a case: a model of a size, bounds, more flags."""
    folder = tmp_path_factory.mktemp("planning")
    answer = "bread kite warm cold tea room line wind salt soup stone river " * 30
    data: list[str] = []
    for pool in ("train", "harmful", "harmless"):
        rows = [chat_row(f"{pool} {i}", answer) for i in range(12)]
        data += [f"--{pool}_data", str(write_jsonl(folder / f"{pool}.jsonl", rows))]
    for name, (hidden, layers) in SIZES.items():
        config = LlamaConfig(
            vocab_size=VOCAB_SIZE, hidden_size=hidden, intermediate_size=2 * hidden + 25, num_hidden_layers=layers,
            num_attention_heads=4, num_key_value_heads=2, tie_word_embeddings=name == "middle",
        )  # fmt: skip
        save_model_folder(LlamaForCausalLM(config), folder / name)
    product = json.loads((ROOT / "ds_configs/z3.json").read_text())
    for name, bounds in BOUNDS.items():
        (folder / f"{name}.json").write_text(
            json.dumps(product | {"zero_optimization": product["zero_optimization"] | bounds})
        )
    counter = iter(range(1000))

    def command(size: str, bounds: str, more: list[str]) -> list[str]:
        return [
            "--model_name_or_path", str(folder / size), "--ds_config", str(folder / f"{bounds}.json"), *data,
            "--max_length", "96", "--reference_max_length", "64", "--per_device_train_batch_size", "2",
            "--max_steps", "3", "--cache_dir", str(folder / "cache"),
            "--output_dir", str(folder / f"run-{next(counter)}"), *more,
        ]  # fmt: skip

    return command


def count(
    server: Lives,
    cases: dict[str, tuple[str, str, list[str]]],
    material: Callable[..., list[str]],
    folder: Path,
    ranks: int,
) -> Found:
    """What the engines held, and what the planner is told of each run."""
    commands = {name: material(*case) for name, case in cases.items()}
    (folder / "cases.json").write_text(json.dumps(commands))
    argv = (str(folder / "cases.json"), str(folder / "found.json"))
    server.run(str(WORKER), *argv, ranks=ranks, logs=folder)
    found = json.loads((folder / "found.json").read_text())
    planned: Found = {}
    for name, case in cases.items():
        run = resolve(material(*case), ranks)
        model = subject(run.model_config, run.model, run.lora, run.train, run.method, cuda=False)
        planned[name] = (found[name], ZeroSettings.read(run.ds_config, ranks), model)
    return planned


@pytest.fixture(scope="module")
def on_two(material: Callable[..., list[str]], server: Lives, tmp_path_factory: pytest.TempPathFactory) -> Found:
    """Two ranks."""
    return count(server, ON_TWO, material, tmp_path_factory.mktemp("two"), 2)


@pytest.fixture(scope="module")
def on_one(material: Callable[..., list[str]], server: Lives, tmp_path_factory: pytest.TempPathFactory) -> Found:
    """One rank."""
    return count(server, ON_ONE, material, tmp_path_factory.mktemp("one"), 1)


def row_of(counted: dict[str, Any]) -> Row:
    return Row(tuple(counted["users"]), (counted["reference"],) * 2, counted["trained"])


def check_states(case: tuple[dict[str, Any], ZeroSettings, Subject]) -> None:
    counted, zero, model = case
    predicted = asdict(states(model.weights, zero))
    assert {name: predicted[name] for name in counted["states"]} == counted["states"]


@pytest.mark.parametrize("name", ON_TWO)
def test_states_are_exact_in_bytes_on_two_ranks(on_two: Found, name: str) -> None:
    check_states(on_two[name])


@pytest.mark.parametrize("name", ON_ONE)
def test_states_are_exact_in_bytes_on_one_rank(on_one: Found, name: str) -> None:
    check_states(on_one[name])


@pytest.mark.parametrize("name", ON_TWO)
def test_gathered_weights_are_exact_in_bytes(on_two: Found, name: str) -> None:
    counted, zero, model = on_two[name]
    predicted = model.gathers(row_of(counted), zero)
    assert predicted.forward + predicted.backward == counted["gathered"] * 4
    assert predicted.live == counted["whole"]


def test_one_rank_gathers_nothing(on_one: Found) -> None:
    counted, zero, model = on_one["one-lora"]
    predicted = model.gathers(row_of(counted), zero)
    assert (predicted.forward, predicted.backward, predicted.live) == (0, 0, 0)
    assert counted["gathered"] == 0


@pytest.mark.parametrize("name", ON_TWO)
def test_saved_activations_are_within_a_hundredth(on_two: Found, name: str) -> None:
    counted, _, model = on_two[name]
    assert model.activations(row_of(counted)).saved == pytest.approx(counted["saved"], rel=0.01)


def test_a_run_says_what_it_expects_and_what_it_measured(material: Callable[..., list[str]]) -> None:
    run = resolve(material("small", "as_set", []), 2)
    expected = forecast(run, torch.device("cpu"))
    assert expected.plan is not None
    line = expectation(expected)
    assert line.startswith(f"predicted peak {shown(expected.plan.peak)} a rank: parameters ")
    assert " s a step" not in line, "a CPU's speed is not in the table"
    assert outcome(expected, {"seconds_per_step": 1.0}) is None, "a CPU has no peak to hold it against"
    measured = {"peak_memory_gib": expected.plan.peak / 2**30 / 1.25, "seconds_per_step": 2.5}
    said = outcome(replace(expected, timed=True), measured)
    assert said is not None
    assert "(+25.0%)" in said
    assert said.endswith("measured 2.50 s")


def test_a_run_that_cannot_be_planned_says_why_and_is_no_error(material: Callable[..., list[str]]) -> None:
    unplanned = forecast(resolve(material("small", "quantised", []), 2), torch.device("cpu"))
    assert re.fullmatch(
        r"not predicted: --ds_config \S*quantised.json: zero_optimization.zero_quantized_weights: .* not planned",
        expectation(unplanned),
    )
    assert outcome(unplanned, {"peak_memory_gib": 1.0, "seconds_per_step": 1.0}) is None


def test_a_traced_step_takes_no_memory_and_leaves_torch_as_it_was(on_two: Found) -> None:
    linear = torch.nn.functional.linear
    counted, _, model = on_two["small-full"]
    model.activations(row_of(counted))
    assert all(parameter.is_meta and parameter.grad is None for parameter in model.model.parameters())
    assert torch.nn.functional.linear is linear
