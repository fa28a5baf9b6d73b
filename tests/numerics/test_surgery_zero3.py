"""Surgery under ZeRO-3 on two gloo ranks equals the plain one-process loop of `reference.py`, tensor by tensor, in
fp32."""

from __future__ import annotations

import itertools
from functools import cache
from typing import Any

import pytest
from peft import get_peft_model

from pipeline.training.adapters import lora_config
from pipeline.training.distributed import World
from tests.command_lines import prepared
from tests.distributed.lives import Lives
from tests.numerics import reference
from tests.numerics.cases import distances, sharp_llama, train_cases, updates

GRADIENT, UPDATE = 1e-4, 1e-3  # relative, of each tensor's norm
CHECKPOINTING = {
    "plain": [],
    "nonreentrant": ["--gradient_checkpointing"],
    "reentrant": ["--gradient_checkpointing", "--gradient_checkpointing_kwargs", '{"use_reentrant": true}'],
}
TRAINED = {"full": [], "lora": ["--lora_r", "4"]}
CASES = {
    f"{trained}-{checkpointing}-acc{accumulation}": [
        *TRAINED[trained], *CHECKPOINTING[checkpointing], "--gradient_accumulation_steps", str(accumulation),
    ]
    for trained, checkpointing, accumulation in itertools.product(TRAINED, CHECKPOINTING, (1, 4))
}  # fmt: skip
OPTIONS = [
    "--references_per_step", "3", "--penalty_every", "2", "--layers", "1", "--heads", "0-1", "3",
    "--sink_token_position", "1",
]  # fmt: skip


@pytest.fixture(scope="module")
def surgery(base: list[str], references: list[str]) -> list[str]:
    return [
        *base, *references, "--method", "surgery", "--alpha", "100", "--max_steps", "10",
        "--per_device_train_batch_size", "2",
    ]  # fmt: skip


@pytest.fixture(scope="module")
def trained(surgery: list[str], server: Lives, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Every case and a broken one, on two ranks."""
    cases: dict[str, Any] = {name: {"argv": [*surgery, *flags]} for name, flags in CASES.items()}
    cases["options"] = {"argv": [*surgery, *OPTIONS]}
    portable = [*surgery, *CASES["full-plain-acc1"], "--attention", "sdpa", "--max_steps", "1"]
    cases["two-calls"] = {"argv": portable}
    cases["detached-lse"] = {"argv": portable, "broken": "detached-lse"}
    return train_cases(server, cases, tmp_path_factory.mktemp("two-ranks"), ranks=2)


@pytest.fixture(scope="module")
def expected(surgery: list[str], trained: Any) -> Any:
    """The reference's record of a case. Checkpointing changes nothing in the formula, so it is left out."""

    @cache
    def compute(kind: str, accumulation: int) -> dict[str, Any]:
        name = f"{kind}-plain-acc{accumulation}"
        run = prepared([*surgery, *CASES[name]], World(0, 0, 2))
        model = sharp_llama().train()
        model.set_attn_implementation("eager")
        if kind == "lora":
            model = get_peft_model(model, lora_config(run.lora))
            model.load_state_dict(trained(name)[0]["initial"], strict=False)
        return reference.train(model, run, ranks=2)

    return compute


@pytest.mark.parametrize("name", CASES)
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
    """loss = CE + alpha R; CE the token mean of the global batch, R the mean over micro-steps and ranks; the norm
    before clipping."""
    _, metrics = trained(name)
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


def test_several_references_every_other_step_on_some_heads(surgery: list[str], trained: Any) -> None:
    """--references_per_step, --penalty_every, --layers, --heads and --sink_token_position together."""
    found, metrics = trained("options")
    model = sharp_llama().train()
    model.set_attn_implementation("eager")
    wanted = reference.train(model, prepared([*surgery, *OPTIONS], World(0, 0, 2)), ranks=2)
    assert max(distances(found["gradients"], wanted["gradients"]).values()) < GRADIENT
    assert max(distances(updates(found), updates(wanted)).values()) < UPDATE
    assert any(wanted["penalty"][::2])
    assert ["sink_penalty" in line for line in metrics] == [True, False] * 5
    for line, r in zip(metrics, wanted["penalty"], strict=True):
        assert line.get("sink_penalty", 0.0) == pytest.approx(r, rel=1e-3, abs=1e-9)
        assert line["loss"] == pytest.approx(line["ce_loss"] + 2 * 100 * line.get("sink_penalty", 0.0), rel=1e-6)


def test_a_detached_log_sum_exp_fails_the_comparison(trained: Any, expected: Any) -> None:
    """The comparison sees the gradient that every flash kernel drops in silence, and passes the two calls that restore
    it."""
    wanted = expected("full", 1)["gradients"]
    assert max(distances(trained("two-calls")[0]["gradients"], wanted).values()) < GRADIENT
    assert max(distances(trained("detached-lse")[0]["gradients"], wanted).values()) > 100 * GRADIENT
