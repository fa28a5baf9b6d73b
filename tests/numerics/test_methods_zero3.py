"""Every method under ZeRO-3 on two gloo ranks equals its formula in one plain process (`plain.py`), tensor by tensor,
in fp32; full-parameter and LoRA, every parameter sharded or small ones gathered, accumulation, checkpointing."""

from __future__ import annotations

import itertools
from functools import cache
from typing import Any

import pytest
from peft import get_peft_model

from pipeline.methods import load_method
from pipeline.training.adapters import lora_config
from tests.numerics import plain, plain_noise
from tests.numerics.cases import distances, prepared, sharp_llama, train_cases, updates

GRADIENT, UPDATE = 1e-4, 1e-3  # relative, of each tensor's norm
# A shift of norm 0.02 moves the loss by a percent; from 0.5 on, fp32 and fp64 differ more than the tolerance allows.
METHODS: dict[str, list[str]] = {
    "vaccine": ["--method", "vaccine", "--rho", "0.02"],
    "vaccine_global": ["--method", "vaccine", "--rho", "0.02", "--scope", "global"],
    "booster": ["--method", "booster", "--lamb", "2", "--perturb_alpha", "0.05"],
    "booster_vaccine": ["--method", "booster", "--lamb", "2", "--perturb_alpha", "0.05", "--rho", "0.02"],
    "lisa": [
        "--method", "lisa", "--rho", "5", "--alignment_steps", "2", "--finetune_steps", "1", "--proximal_after", "0.2"
    ],
    "t_vaccine": [
        "--method", "t_vaccine", "--rho", "0.02", "--perturbed_layers", "1", "--resample_every", "1", "--score_every",
        "2",
    ],
    "repnoise": ["--method", "repnoise", "--alpha", "0.5", "--beta", "0.2"],
    "tar": [
        "--method", "tar", "--inner_steps", "3", "--tamper_every", "2", "--inner_learning_rates", "1e-4", "2e-4",
        "--lamb_tr", "2",
    ],
}  # fmt: skip
TRAINED = {"full": [], "lora": ["--lora_r", "4"]}
LAYOUTS = {  # checkpointing and persistence are spread over the others, so that each meets each
    "acc1": ["--gradient_accumulation_steps", "1"],
    "acc2": ["--gradient_accumulation_steps", "2", "--gradient_checkpointing"],
    "persistent": ["--gradient_accumulation_steps", "2"],
}
CASES = list(itertools.product(METHODS, TRAINED, LAYOUTS))
BROKEN = {
    "norm-of-one-layer": "vaccine-full-acc1",
    "norm-of-this-rank": "booster-full-acc1",
    "behind-gathered-copies": "booster-lora-persistent",
    "pull-halved": "lisa-full-acc1",
    "frozen-by-gradient-only": "t_vaccine-full-acc1",
}


@pytest.fixture(scope="module")
def flags(base: list[str], default_ds: str, pools: dict[str, str]) -> Any:
    """The flags of a case by its name, such as vaccine-full-acc1."""

    def of(name: str) -> list[str]:
        method, trained, layout = name.rsplit("-", 2)
        persistent = ["--ds_config", default_ds] if layout == "persistent" else []
        harmful = pools["paired" if method == "repnoise" else "many"]
        data = {"harmful": harmful, "guide": pools["guide"], "tamper": pools["tamper"]}
        kind = load_method(METHODS[method][1])
        given = [word for pool in kind.pools for word in (f"--{pool}_data", data[pool])]
        return [
            *base, "--max_steps", "4", "--adam_epsilon", "1e-3", "--per_device_train_batch_size", "2", *METHODS[method], *given,
            *TRAINED[trained], *LAYOUTS[layout], *persistent,
        ]  # fmt: skip

    return of


@pytest.fixture(scope="module")
def trained(flags: Any, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Every case and the broken ones, on two ranks."""
    cases: dict[str, Any] = {"-".join(case): {"argv": flags("-".join(case))} for case in CASES}
    cases |= {mistake: {"argv": flags(case), "broken": mistake} for mistake, case in BROKEN.items()}
    return train_cases(cases, tmp_path_factory.mktemp("two-ranks"), ranks=2)


@pytest.fixture(scope="module")
def expected(flags: Any, trained: Any) -> Any:
    """The formula's record of a case. Checkpointing and persistence change nothing in it, so they are left out."""

    @cache
    def compute(method: str, kind: str, accumulation: int) -> dict[str, Any]:
        name = f"{method}-{kind}-acc{accumulation}"
        run = prepared(flags(name), ranks=2)
        model = sharp_llama().train()
        model.set_attn_implementation("eager")
        if kind == "lora":
            model = get_peft_model(model, lora_config(run.lora))
            model.load_state_dict(trained(name)[0]["initial"], strict=False)
        return plain.train(model, run, (plain.STEPS | plain_noise.STEPS)[run.method_name])

    return lambda method, kind, layout: compute(method, kind, 1 if layout == "acc1" else 2)


@pytest.mark.parametrize("case", CASES, ids="-".join)
def test_first_gradient_and_four_updates_equal_the_formula(case: tuple[str, ...], trained: Any, expected: Any) -> None:
    found, metrics = trained("-".join(case))
    wanted = expected(*case)
    wrong = {n: e for n, e in distances(found["gradients"], wanted["gradients"]).items() if e > GRADIENT}
    assert not wrong, f"gradients differ: {wrong}"
    wrong = {n: e for n, e in distances(updates(found), updates(wanted)).items() if e > UPDATE}
    assert not wrong, f"updates differ: {wrong}"
    assert [line["loss"] for line in metrics] == pytest.approx(wanted["losses"], rel=1e-4)
    assert [line["grad_norm"] for line in metrics] == pytest.approx(wanted["norms"], rel=1e-3)


@pytest.mark.parametrize("case", CASES, ids="-".join)
def test_a_step_steps_once_and_leaves_alone_what_is_not_trained(case: tuple[str, ...], trained: Any) -> None:
    """One optimizer step and one tick of the schedule; the weights are the step's first ones when the optimizer steps,
    bit for bit, and frozen ones never move, on any rank; ranks agree on what the method remembers."""
    found, _ = trained("-".join(case))
    assert found["ticks"] == [(step, step) for step in range(1, 5)]
    assert found["restored"]
    assert found["still"]
    assert found["same_state"]


@pytest.mark.parametrize(("mistake", "case"), BROKEN.items())
def test_a_mistake_fails_the_comparison(mistake: str, case: str, trained: Any, expected: Any) -> None:
    broken, _ = trained(mistake)
    wanted = expected(*case.rsplit("-", 2))
    gradient = max(distances(broken["gradients"], wanted["gradients"]).values())
    update = max(distances(updates(broken), updates(wanted)).values())
    assert gradient > 10 * GRADIENT or update > 10 * UPDATE
