"""Surgery under ZeRO-3 on two gloo ranks equals the plain one-process loop of `reference.py`, tensor by tensor, in fp32."""

from __future__ import annotations

import itertools
import json
import random
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import get_peft_model

from pipeline.config import DataArguments, LoraArguments, ModelArguments, TrainArguments, parse
from pipeline.methods import load_method
from pipeline.training.distributed import World
from pipeline.training.preflight import Prepared, lora_config, prepare
from tests.numerics import reference
from tests.ranks import ROOT, run_ranks
from tests.tiny import chat_row, save_model_folder, tiny_llama, write_jsonl

WORKER = Path(__file__).with_name("zero3_worker.py")
GRADIENT, UPDATE = 1e-4, 1e-3  # relative, of each tensor's norm
ZERO = 1e-7  # absolute, where the reference is zero
CHECKPOINTING = {"plain": [], "nonreentrant": ["--gradient_checkpointing"],
                 "reentrant": ["--gradient_checkpointing", "--gradient_checkpointing_kwargs", '{"use_reentrant": true}']}  # fmt: skip
TRAINED = {"full": [], "lora": ["--lora_r", "4"]}
SURGERY = {
    f"{trained}-{checkpointing}-acc{accumulation}": [
        "--method", "surgery", "--alpha", "100", *TRAINED[trained], *CHECKPOINTING[checkpointing],
        "--gradient_accumulation_steps", str(accumulation),
    ]
    for trained, checkpointing, accumulation in itertools.product(TRAINED, CHECKPOINTING, (1, 4))
}  # fmt: skip


def words(generator: random.Random, low: int, high: int) -> str:
    return " ".join(generator.choice(["bread", "kite", "warm", "cold", "tea", "room", "the", "line"]) for _ in range(generator.randint(low, high)))


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Flags of the pools, with rows of very different lengths."""
    folder, generator = tmp_path_factory.mktemp("pools"), random.Random(0)
    flags = []
    for name, count in (("train", 30), ("harmful", 6), ("harmless", 6)):
        rows = [chat_row(f"{name} {i} {words(generator, 1, 8)}", words(generator, 1, 12)) for i in range(count)]
        flags += [f"--{name}_data", str(write_jsonl(folder / f"{name}.jsonl", rows))]
    return flags


@pytest.fixture(scope="module")
def ds_config(tmp_path_factory: pytest.TempPathFactory) -> str:
    """ds_configs/z3.json with every parameter sharded, however small."""
    config = json.loads((ROOT / "ds_configs/z3.json").read_text())
    config["zero_optimization"]["stage3_param_persistence_threshold"] = 0
    path = tmp_path_factory.mktemp("ds") / "z3.json"
    path.write_text(json.dumps(config))
    return str(path)


def sharp_llama() -> Any:
    """The tiny Llama with attention far from uniform, so that heads differ and the penalty matters from the first step."""
    model = tiny_llama()
    with torch.no_grad():
        for layer in model.model.layers:
            layer.self_attn.q_proj.weight.mul_(20)
            layer.self_attn.k_proj.weight.mul_(20)
    return model


@pytest.fixture(scope="module")
def common(data: list[str], ds_config: str, tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    model = save_model_folder(sharp_llama(), tmp_path_factory.mktemp("model"))
    return [
        "--model_name_or_path", str(model), "--ds_config", ds_config, *data, "--max_steps", "10", "--seed", "7",
        "--per_device_train_batch_size", "2", "--learning_rate", "1e-3", "--cache_dir", str(tmp_path_factory.mktemp("cache")),
    ]  # fmt: skip


def parsed_run(argv: list[str], ranks: int) -> Prepared:
    name = argv[argv.index("--method") + 1]
    method = load_method(name)
    parsed = parse([ModelArguments, DataArguments, LoraArguments, TrainArguments, method.Config], argv, description="test")
    return prepare(parsed, name, method(parsed[method.Config]), World(0, 0, ranks))


@pytest.fixture(scope="module")
def trained(common: list[str], tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Every Surgery case and a broken one, trained on two ranks in one process group."""
    out = tmp_path_factory.mktemp("two-ranks")
    cases: dict[str, Any] = {name: {"argv": [*common, *flags]} for name, flags in SURGERY.items()}
    cases["detached-lse"] = {"argv": [*common, *SURGERY["full-plain-acc1"]], "detach_lse": True}
    for name, case in cases.items():
        case["argv"] += ["--output_dir", str(out / name)]
    (out / "cases.json").write_text(json.dumps(cases))
    run_ranks(WORKER, str(out / "cases.json"), str(out), ranks=2)

    @cache
    def read(name: str) -> tuple[dict[str, Any], list[dict[str, Any]]]:
        metrics = [json.loads(line) for line in (out / name / "metrics.jsonl").read_text().splitlines()]
        return torch.load(out / f"{name}.pt", weights_only=True), metrics

    return read


@pytest.fixture(scope="module")
def expected(common: list[str], trained: Any) -> Any:
    """The reference's record of a case. Checkpointing changes nothing in the formula, so it is left out."""

    @cache
    def compute(kind: str, accumulation: int) -> dict[str, Any]:
        name = f"{kind}-plain-acc{accumulation}"
        run = parsed_run([*common, *SURGERY[name]], ranks=2)
        model = sharp_llama().train()
        model.set_attn_implementation("eager")
        if kind == "lora":
            model = get_peft_model(model, lora_config(run.lora))
            model.load_state_dict(trained(name)[0]["initial"], strict=False)
        return reference.train(model, run, ranks=2)

    return compute


def distances(found: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor]) -> dict[str, float]:
    """Each tensor's error as a share of what is allowed at relative tolerance 1."""
    assert found.keys() == wanted.keys()
    errors = {}
    for name, want in wanted.items():
        error = (found[name] - want).norm().item()
        errors[name] = error / want.norm().item() if want.norm() > ZERO else error / ZERO
    return errors


def updates(record: dict[str, Any]) -> dict[str, torch.Tensor]:
    return {name: record["final"][name] - record["initial"][name] for name in record["final"]}


@pytest.mark.parametrize("name", SURGERY)
def test_first_gradient_and_ten_updates_equal_the_reference(name: str, trained: Any, expected: Any) -> None:
    found, _ = trained(name)
    kind, _, accumulation = name.split("-")
    wanted = expected(kind, int(accumulation.removeprefix("acc")))
    wrong = {n: e for n, e in distances(found["gradients"], wanted["gradients"]).items() if e > GRADIENT}
    assert not wrong, f"gradients differ: {wrong}"
    wrong = {n: e for n, e in distances(updates(found), updates(wanted)).items() if e > UPDATE}
    assert not wrong, f"updates differ: {wrong}"


@pytest.mark.parametrize("name", ["full-plain-acc1", "full-reentrant-acc4", "lora-nonreentrant-acc4"])
def test_logged_numbers_are_the_formulas(name: str, trained: Any, expected: Any) -> None:
    """loss = CE + alpha R; CE the token mean of the global batch, R the mean over micro-steps and ranks; the norm before clipping."""
    record, metrics = trained(name)
    kind, _, accumulation = name.split("-")
    wanted = expected(kind, int(accumulation.removeprefix("acc")))
    assert [line["ce_loss"] for line in metrics] == pytest.approx(wanted["ce"], rel=1e-4)
    assert [line["sink_penalty"] for line in metrics] == pytest.approx(wanted["penalty"], rel=1e-3, abs=1e-9)
    assert [line["grad_norm"] for line in metrics] == pytest.approx(wanted["norms"], rel=1e-3)
    for line in metrics:
        assert line["loss"] == pytest.approx(line["ce_loss"] + 100 * line["sink_penalty"], rel=1e-6)
    assert metrics[0]["sink_penalty"] > 0
    assert 0 < metrics[0]["positive_heads"] < 1
    assert any(norm > 1 for norm in wanted["norms"]), "the case must reach the clipping threshold to test it"


def test_a_detached_log_sum_exp_fails_the_comparison(trained: Any, expected: Any) -> None:
    """The comparison sees the gradient that every flash kernel drops in silence."""
    broken, _ = trained("detached-lse")
    errors = distances(broken["gradients"], expected("full", 1)["gradients"])
    assert max(errors.values()) > 100 * GRADIENT
