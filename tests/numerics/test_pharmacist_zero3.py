"""Pharmacist's selector under ZeRO-3, on one rank and on two, equals its formulas in one plain process, in fp32."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import get_peft_model
from transformers import AutoModelForCausalLM

from pipeline.config import parse
from pipeline.curation import pharmacist
from pipeline.curation.pharmacist_method import Pharmacist
from pipeline.curation.pharmacist_settings import PharmacistArguments, training_flags
from pipeline.training.adapters import lora_config
from pipeline.training.distributed import World
from pipeline.training.preflight import prepare
from tests.distributed.lives import Lives
from tests.numerics import plain_pharmacist

WORKER = Path(__file__).with_name("pharmacist_worker.py")
# Strong enough that the increment moves the loss in the third digit. In so small a model the gradients of attention
# scores are rounding, which Adam would make into whole steps: not q and k.
MAPS = ["v_proj", "o_proj"]
TOXIC = ["--kappa", "3", "--toxic_learning_rate", "1e-2", "--toxic_target_modules", *MAPS]
LAMB = ["--lamb", "0.7", "--lamb_decay", "0.3"]
CASES = {
    "joint": [*TOXIC, *LAMB, "--baselines", "gradient_cosine"],
    "seal": ["--kappa", "0", *LAMB, "--selector_update", "dense"],
    "hypergradient": ["--variant", "hypergradient", *TOXIC, "--gradient_checkpointing", "true"],
}
MICRO_BATCHES = 4
LOSS, SCORE = 2e-5, 2e-3  # relative; scores relative to the learning rate of the logits
ROWS = 18  # with a last batch that is filled up

Record = dict[str, Any]


@pytest.fixture(scope="module")
def argv(base: list[str], pools: dict[str, str], tiny_model_dir: Path) -> Callable[..., list[str]]:
    """The command line of a case on a number of ranks."""
    flags = dict(zip(base[::2], base[1::2], strict=True))
    shared = {name: flags[name] for name in ("--ds_config", "--cache_dir")}
    shared |= {
        "--train_data": f"{pools['train']}[:{ROWS}]",
        "--model_name_or_path": str(tiny_model_dir),
        "--guide_data": pools["guide"], "--num_train_epochs": "2",
        "--per_device_train_batch_size": "2", "--learning_rate": "1e-2", "--seed": "3",
    }  # fmt: skip
    words = [word for pair in shared.items() for word in pair]
    harmful = ["--harmful_data", pools["many"]]

    def of(case: str, ranks: int) -> list[str]:
        accumulation = ["--gradient_accumulation_steps", str(MICRO_BATCHES // ranks)]
        maps = ["--lora_target_modules", *MAPS]
        return [*words, *accumulation, *maps, *CASES[case], *(harmful if case != "seal" else [])]

    return of


@pytest.fixture(scope="module")
def product(
    argv: Callable[..., list[str]], server: Lives, tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str, int], Record]:
    """What the product computes in a case on a number of ranks."""

    @cache
    def folder(ranks: int) -> Path:
        out = tmp_path_factory.mktemp(f"ranks{ranks}")
        cases = {name: [*argv(name, ranks), "--output_dir", str(out / "out")] for name in CASES}
        (out / "cases.json").write_text(json.dumps(cases))
        server.run(str(WORKER), str(out / "cases.json"), str(out), ranks=ranks, logs=out, timeout=300)
        return out

    return cache(lambda case, ranks: torch.load(folder(ranks) / f"{case}.pt", weights_only=True))


@pytest.fixture(scope="module")
def wanted(
    argv: Callable[..., list[str]], product: Callable[[str, int], Record], tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str], tuple[plain_pharmacist.Plain, Record]]:
    """The plain reference of a case; it starts where the product started on one rank."""

    @cache
    def of(case: str) -> tuple[plain_pharmacist.Plain, Record]:
        parsed = parse(pharmacist.CONFIGS, argv(case, 1), description="test")
        parsed[PharmacistArguments].output_dir = str(tmp_path_factory.mktemp("plain") / "out")
        asked = parsed[PharmacistArguments]
        run = prepare(training_flags(parsed), "pharmacist", Pharmacist(asked), World(0, 0, 1))
        bare = AutoModelForCausalLM.from_pretrained(run.model_path, attn_implementation="eager")
        plain = plain_pharmacist.Plain(get_peft_model(bare, lora_config(run.lora)), run, asked, product(case, 1))
        cosines = plain.cosines() if "gradient_cosine" in asked.baselines else None
        return plain, plain_pharmacist.train(plain) | {"cosines": cosines}

    return of


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("case", CASES)
def test_losses_and_scores_equal_the_formulas(case: str, ranks: int, product: Any, wanted: Any) -> None:
    found, (_, want) = product(case, ranks), wanted(case)
    history = found["history"]
    torch.testing.assert_close([each["upper_loss"] for each in history], want["upper"], rtol=LOSS, atol=0)
    torch.testing.assert_close([each["row_loss"] for each in history], want["row"], rtol=LOSS, atol=0)
    torch.testing.assert_close(found["last_losses"], want["last"], rtol=LOSS, atol=0)
    torch.testing.assert_close(found["scores"], want["scores"], rtol=0, atol=SCORE * 5e-3)
    assert found["weights"].sum().item() == pytest.approx(ROWS, abs=1e-9)
    assert want["scores"].std() > 0.1 * 5e-3  # they differ by more than the tolerance


def test_the_increment_is_trained_by_the_formula(product: Any, wanted: Any) -> None:
    _, want = wanted("joint")
    for ranks in (1, 2):
        toxic = product("joint", ranks)["toxic"]
        assert toxic["batches"] == len(want["attack"]) == 4
        assert toxic["last_loss"] == pytest.approx(want["attack"][-1], rel=LOSS)
    assert want["attack"][-1] < 0.99 * want["attack"][0]


@pytest.mark.parametrize("case", ["joint", "hypergradient"])
def test_the_increment_gets_no_gradient(case: str, product: Any) -> None:
    for ranks in (1, 2):
        found = product(case, ranks)
        assert found["toxic_gradients"] == [None] * len(found["trained"])
        assert all(map(torch.equal, found["trained"], found["toxic_end"]))
        assert not any("toxic" in name or "lora" not in name for name in found["initial"])  # what is trained


def test_the_finite_difference_equals_the_exact_product(product: Any, wanted: Any) -> None:
    _, want = wanted("hypergradient")
    for ranks in (1, 2):
        for found, exact in zip(product("hypergradient", ranks)["of_weights"], want["of_weights"], strict=True):
            assert ((found - exact).norm() / exact.norm()).item() < 5e-3


def test_kappa_0_gives_seals_losses(product: Any, wanted: Any) -> None:
    """SEAL has no increment: its upper loss is the guide rows' at the adapter alone."""
    plain, want = wanted("seal")
    assert product("seal", 1)["toxic"] is None
    assert plain.down == []
    joint = product("joint", 1)
    assert abs(joint["history"][0]["upper_loss"] / want["upper"][0] - 1) > 100 * LOSS  # with it the loss is another
    assert joint["history"][0]["row_loss"] == pytest.approx(want["row"][0], rel=LOSS)  # off in the lower level


def test_gradient_cosines_equal_the_exact_ones(product: Any, wanted: Any) -> None:
    _, want = wanted("joint")
    for ranks in (1, 2):
        torch.testing.assert_close(product("joint", ranks)["cosines"], want["cosines"], rtol=0, atol=1e-4)
