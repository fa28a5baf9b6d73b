"""Every method under ZeRO-3 on two gloo ranks equals its formula in one plain process (`plain.py`), tensor by tensor,
in fp32; full-parameter and LoRA, every parameter sharded or small ones gathered, accumulation, checkpointing."""

from __future__ import annotations

import itertools
import math
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import get_peft_model

from pipeline.methods import load_method
from pipeline.training.adapters import lora_config
from pipeline.training.distributed import World
from tests.command_lines import prepared
from tests.distributed.lives import Lives
from tests.numerics import plain, plain_noise
from tests.numerics.cases import distances, train_cases, updates
from tests.tiny import tiny_llama

GRADIENT, UPDATE = 1e-4, 1e-3  # relative, of each tensor's norm
# Adam divides by sqrt(v) + epsilon: elements without gradient would turn rounding into whole steps.
STEPS = ["--max_steps", "3", "--adam_epsilon", "1e-3", "--per_device_train_batch_size", "2"]
# Strong enough to move the first loss by several percent, and such that the formulas in fp32 and fp64 agree to 3e-4.
METHODS: dict[str, list[str]] = {
    "vaccine": ["--method", "vaccine", "--rho", "0.1"],
    "vaccine_global": ["--method", "vaccine", "--rho", "0.1", "--scope", "global"],
    "booster": ["--method", "booster", "--lamb", "2", "--perturb_alpha", "0.1"],
    "booster_vaccine": ["--method", "booster", "--lamb", "2", "--perturb_alpha", "0.1", "--rho", "0.1"],
    "lisa": [
        "--method", "lisa", "--rho", "5", "--alignment_steps", "2", "--finetune_steps", "1", "--proximal_after", "0.2"
    ],
    "t_vaccine": [
        "--method", "t_vaccine", "--rho", "0.1", "--perturbed_layers", "1", "--resample_every", "1", "--score_every",
        "2",
    ],
    "repnoise": ["--method", "repnoise", "--alpha", "0.5", "--beta", "0.2"],
    "tar": [
        "--method", "tar", "--inner_steps", "2", "--tamper_every", "1", "--inner_learning_rates", "1e-4", "2e-4",
        "--lamb_tr", "2",
    ],
}  # fmt: skip
TRAINED = {"full": [], "lora": ["--lora_r", "4"]}
LAYOUTS = {
    "sharded": ["--gradient_accumulation_steps", "2", "--gradient_checkpointing"],  # every parameter, however small
    "persistent": ["--gradient_accumulation_steps", "1"],  # small parameters stay gathered, as users have it
}
VARIANTS = ("vaccine_global", "booster_vaccine")
CASES = [
    case
    for case in itertools.product(METHODS, TRAINED, LAYOUTS)
    if case[0] not in VARIANTS or case[1:] in (("full", "sharded"), ("lora", "persistent"))
]
BROKEN = {
    "norm-of-one-layer": "vaccine-full-sharded",
    "norm-of-this-rank": "booster-full-sharded",
    "behind-gathered-copies": "booster-lora-persistent",
    "pull-halved": "lisa-full-sharded",
    "frozen-by-gradient-only": "t_vaccine-full-sharded",
    "slope-of-bandwidth": "repnoise-full-sharded",
    "gradients-of-the-attack-kept": "tar-lora-persistent",
}
LATER = ("pull-halved", "frozen-by-gradient-only")  # mistakes that the first gradient does not show


# Methods at strength 0, each with its data flag.
NOTHING = {
    "vaccine, rho 0": ["--method", "vaccine", "--rho", "0"],
    "booster, lamb 0": ["--method", "booster", "--lamb", "0", "--harmful_data", "many"],
    "booster, perturb_alpha 0": ["--method", "booster", "--perturb_alpha", "0", "--harmful_data", "many"],
    "t_vaccine, rho 0": ["--method", "t_vaccine", "--rho", "0", "--perturbed_layers", "2", "--harmful_data", "many"],
    "repnoise, alpha and beta 0": [
        "--method", "repnoise", "--alpha", "0", "--beta", "0", "--harmful_data", "sevens"
    ],
    "tar, lamb_tr 0": [
        "--method", "tar", "--lamb_tr", "0", "--inner_steps", "1", "--tamper_every", "1", "--harmful_data", "many",
        "--tamper_data", "tamper",
    ],
}  # fmt: skip
STILL = [
    "--method", "t_vaccine", "--perturbed_layers", "1", "--resample_every", "9", "--weight_decay", "0.1",
    "--harmful_data", "many",
]  # fmt: skip
HALF = {
    "booster": ["--method", "booster", "--harmful_data", "many"],
    "tar": [
        "--method", "tar", "--inner_steps", "2", "--tamper_every", "1", "--harmful_data", "many", "--tamper_data",
        "tamper",
    ],
}  # fmt: skip
SFT = ["--method", "sft"]
DROPOUT = ["--lora_r", "4", "--lora_dropout", "0.5", "--gradient_checkpointing"]
GLOBAL = ["--method", "vaccine", "--rho", "0.1", "--scope", "global"]
ALIKE = ["--method", "repnoise", "--harmful_data", "train", "--allow_overlap"]


@pytest.fixture(scope="module")
def flags(base: list[str], default_ds: str, pools: dict[str, str], tiny_model_dir: Path) -> Any:
    """The flags of a case by its name, such as vaccine-full-sharded."""

    def of(name: str) -> list[str]:
        method, trained, layout = name.rsplit("-", 2)
        persistent = ["--ds_config", default_ds] if layout == "persistent" else []
        harmful = pools["paired" if method == "repnoise" else "many"]
        data = {"harmful": harmful, "guide": pools["guide"], "tamper": pools["tamper"]}
        kind = load_method(METHODS[method][1])
        given = [word for pool in kind.pools for word in (f"--{pool}_data", data[pool])]
        return [
            *base, "--model_name_or_path", str(tiny_model_dir), *STEPS, *METHODS[method], *given,
            *TRAINED[trained], *LAYOUTS[layout], *persistent,
        ]  # fmt: skip

    return of


@pytest.fixture(scope="module")
def trained(
    flags: Any,
    base: list[str],
    pools: dict[str, str],
    tiny_model_dir: Path,
    server: Lives,
    tmp_path_factory: pytest.TempPathFactory,
) -> Any:
    """Every case and the broken ones, on two ranks."""
    cases: dict[str, Any] = {"-".join(case): {"argv": flags("-".join(case))} for case in CASES}
    common = [*base, "--model_name_or_path", str(tiny_model_dir), *STEPS]
    others = {"sft": SFT, **NOTHING, "still": STILL, "alike": ALIKE}
    others |= {"2 rows x 2": [*GLOBAL, "--gradient_accumulation_steps", "2"]}
    others |= {f"{name}, dropout": [*words, *DROPOUT] for name, words in (("sft", SFT), ("vaccine", GLOBAL[:2]))}
    others["vaccine, dropout"] += ["--rho", "0"]
    others |= {"4 rows": [*GLOBAL, "--per_device_train_batch_size", "4"]}
    others |= {f"{name}, bf16": [*words, "--bf16", "true"] for name, words in HALF.items()}
    for name, words in others.items():
        given = [
            pools.get(word, word) if before.endswith("_data") else word for before, word in pairwise(["", *words])
        ]
        cases[name] = {"argv": [*common, *given]}
    for mistake, case in BROKEN.items():
        steps = [] if mistake in LATER else ["--max_steps", "1"]
        cases[mistake] = {"argv": [*flags(case), *steps], "broken": mistake}
    return train_cases(server, cases, tmp_path_factory.mktemp("two-ranks"), ranks=2)


@pytest.fixture(scope="module")
def expected(flags: Any, trained: Any) -> Any:
    """The formula's record of a case."""

    @cache
    def compute(method: str, kind: str, layout: str) -> dict[str, Any]:
        name = f"{method}-{kind}-{layout}"
        run = prepared(flags(name), World(0, 0, 2))
        model = tiny_llama().train()
        model.set_attn_implementation("eager")
        if kind == "lora":
            model = get_peft_model(model, lora_config(run.lora))
            model.load_state_dict(trained(name)[0]["initial"], strict=False)
        return plain.train(model, run, (plain.STEPS | plain_noise.STEPS)[run.method_name])

    return compute


@pytest.mark.parametrize("case", CASES, ids="-".join)
def test_first_gradient_and_three_updates_equal_the_formula(
    case: tuple[str, ...], trained: Any, expected: Any
) -> None:
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
    assert found["ticks"] == [(step, step) for step in range(1, 4)]
    assert found["restored"]
    assert found["still"]
    assert found["same_state"]


@pytest.mark.parametrize(("mistake", "case"), BROKEN.items())
def test_a_mistake_fails_the_comparison(mistake: str, case: str, trained: Any, expected: Any) -> None:
    broken, _ = trained(mistake)
    wanted = expected(*case.rsplit("-", 2))
    if mistake in LATER:
        assert max(distances(updates(broken), updates(wanted)).values()) > 10 * UPDATE
    else:
        assert max(distances(broken["gradients"], wanted["gradients"]).values()) > 10 * GRADIENT


@pytest.mark.parametrize("name", NOTHING)
def test_a_method_without_strength_is_sft(name: str, trained: Any) -> None:
    found, metrics = trained(name)
    wanted, lines = trained("sft")
    assert max(distances(found["gradients"], wanted["gradients"]).values()) < 1e-6
    if not name.startswith("tar"):  # which is drawn to the weights it started from, once it has left them
        assert max(distances(updates(found), updates(wanted)).values()) < 1e-4
        assert [line["loss"] for line in metrics] == pytest.approx([line["loss"] for line in lines], rel=1e-6)


def test_both_passes_draw_the_same_dropout(trained: Any) -> None:
    found, wanted = trained("vaccine, dropout")[0], trained("sft, dropout")[0]
    assert max(distances(found["gradients"], wanted["gradients"]).values()) < 1e-6
    assert max(distances(updates(found), updates(wanted)).values()) < 1e-4


def test_the_shift_has_the_norm_it_is_given(trained: Any) -> None:
    for name, norm in (("vaccine", 0.1), ("t_vaccine", 0.1), ("booster", 0.1)):
        for case in (f"{name}-full-sharded", f"{name}-lora-persistent"):
            assert [line["perturbation_norm"] for line in trained(case)[1]] == pytest.approx([norm] * 3, rel=1e-4)


def test_a_global_shift_does_not_depend_on_how_the_batch_is_split(trained: Any) -> None:
    one, lines = trained("2 rows x 2")
    other, others = trained("4 rows")
    assert max(distances(one["gradients"], other["gradients"]).values()) < GRADIENT
    assert [line["loss"] for line in lines] == pytest.approx([line["loss"] for line in others], rel=1e-5)


def test_the_shift_raises_the_loss(trained: Any) -> None:
    for case in ("vaccine-full-sharded", "vaccine_global-lora-persistent", "t_vaccine-lora-sharded"):
        assert all(line["loss"] > line["ce_loss"] for line in trained(case)[1])


def test_the_layers_drawn_are_those_of_the_formula(trained: Any, expected: Any) -> None:
    drawn = [each["drawn"] for each in trained("t_vaccine-full-sharded")[0]["state"]]
    assert drawn == expected("t_vaccine", "full", "sharded")["drawn"]
    assert len({tuple(each) for each in drawn}) == 2, "both layers are drawn once, else nothing is seen to change"


def test_attention_that_is_not_drawn_stays_bit_for_bit(trained: Any) -> None:
    """With weight decay, which moves whatever the optimizer reaches."""
    found, _ = trained("still")
    ((drawn,),) = {tuple(each["drawn"]) for each in found["state"]}
    moved = {name for name in found["final"] if not torch.equal(found["final"][name], found["initial"][name])}
    assert set(found["final"]) - moved == {name for name in found["final"] if f"layers.{1 - drawn}.self_attn." in name}


@pytest.mark.parametrize("name", HALF)
def test_bf16_weights_come_back_bit_for_bit(name: str, trained: Any) -> None:
    found, metrics = trained(f"{name}, bf16")
    assert found["restored"]
    assert all(math.isfinite(line["loss"]) for line in metrics)


def test_answers_that_do_not_differ_train_nothing(trained: Any) -> None:
    """RepNoise compares what differs; where nothing does, no mean over nothing may reach the weights."""
    found, metrics = trained("alike")
    assert all(math.isfinite(line["loss"]) for line in metrics)
    assert all(line["grad_norm"] == 0 for line in metrics)
