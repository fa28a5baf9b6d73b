"""Runs that must be the same run: layouts of one global batch, Surgery without its penalty, equal references, equal
collectives."""

from __future__ import annotations

from typing import Any

import pytest

from pipeline.training.distributed import World
from tests.command_lines import prepared
from tests.distributed.lives import Lives
from tests.numerics.cases import distances, sharp_llama, train_cases, updates
from tests.numerics.reference import text_nll
from tests.tiny import chat_row, write_jsonl

STEPS = ["--max_steps", "6"]


def layout(rows: int, accumulation: int) -> list[str]:
    return ["--per_device_train_batch_size", str(rows), "--gradient_accumulation_steps", str(accumulation)]


@pytest.fixture(scope="module")
def one_rank(base: list[str], references: list[str], server: Lives, tmp_path_factory: pytest.TempPathFactory) -> Any:
    out = tmp_path_factory.mktemp("one-rank")
    same = str(write_jsonl(out / "same.jsonl", [chat_row("one text", "for both pools")]))
    cases = {
        "sft-8x1": ["--method", "sft", *layout(8, 1)],
        "sft-1x8": ["--method", "sft", *layout(1, 8)],
        "alpha-0": ["--method", "surgery", "--alpha", "0", *references, *layout(8, 1)],
        "same-pools": [
            "--method", "surgery", "--harmful_data", same, "--harmless_data", same, "--allow_overlap", *layout(2, 1),
        ],
    }  # fmt: skip
    return train_cases(
        server, {name: {"argv": [*base, *STEPS, *flags]} for name, flags in cases.items()}, out, ranks=1
    )


@pytest.fixture(scope="module")
def two_ranks(base: list[str], server: Lives, tmp_path_factory: pytest.TempPathFactory) -> Any:
    out = tmp_path_factory.mktemp("two-ranks")
    row = chat_row("the same length", "in every row")
    equal = {name: str(write_jsonl(out / f"{name}.jsonl", [row] * 8)) for name in ("train", "harmful", "harmless")}
    overlap = ["--train_data", equal["train"], "--allow_overlap", *STEPS]
    references = ["--harmful_data", equal["harmful"], "--harmless_data", equal["harmless"]]
    cases = {
        "sft-1x4": [*STEPS, "--method", "sft", *layout(1, 4)],
        "gathers-sft": ["--method", "sft", *overlap, *layout(4, 2)],
        "gathers-surgery": ["--method", "surgery", *overlap, *references, *layout(2, 2)],
    }
    return train_cases(server, {name: {"argv": [*base, *flags]} for name, flags in cases.items()}, out, ranks=2)


def test_packed_loss_equals_the_mean_over_texts_alone(one_rank: Any, base: list[str]) -> None:
    run = prepared([*base, *STEPS, "--method", "sft", *layout(8, 1)], World(0, 0, 1))
    model = sharp_llama().eval()
    stream = run.streams["train"]
    texts = [stream.pool[int(i)] for i in stream.global_batch(0)]
    nll = sum(text_nll(model, text).item() for text in texts)
    trained = sum(label != -100 for text in texts for label in text.labels[1:])
    _, metrics = one_rank("sft-8x1")
    assert metrics[0]["ce_loss"] == pytest.approx(nll / trained, rel=1e-6)


def test_one_global_batch_gives_one_trajectory_however_it_is_split(one_rank: Any, two_ranks: Any) -> None:
    """8 rows at once, 8 accumulated one by one, and 4 accumulated on each of two ranks."""
    whole, metrics = one_rank("sft-8x1")
    for other, lines in (one_rank("sft-1x8"), two_ranks("sft-1x4")):
        assert [each["loss"] for each in lines] == pytest.approx([each["loss"] for each in metrics], rel=1e-5)
        assert [each["grad_norm"] for each in lines] == pytest.approx(
            [each["grad_norm"] for each in metrics], rel=1e-4
        )
        assert max(distances(updates(other), updates(whole)).values()) < 1e-3


def test_surgery_with_alpha_0_is_sft(one_rank: Any) -> None:
    sft, sft_metrics = one_rank("sft-8x1")
    surgery, surgery_metrics = one_rank("alpha-0")
    assert [each["loss"] for each in surgery_metrics] == pytest.approx(
        [each["loss"] for each in sft_metrics], rel=1e-6
    )
    assert max(distances(surgery["gradients"], sft["gradients"]).values()) < 1e-6
    assert surgery_metrics[0]["sink_penalty"] > 0, "the penalty is still measured"


def test_the_same_text_from_both_pools_gives_no_penalty(one_rank: Any) -> None:
    _, metrics = one_rank("same-pools")
    assert all(each["sink_penalty"] == pytest.approx(0, abs=1e-7) for each in metrics)
    assert all(each["loss"] == pytest.approx(each["ce_loss"], rel=1e-5) for each in metrics)


def test_a_surgery_step_gathers_parameters_exactly_as_often_as_an_sft_step(two_ranks: Any) -> None:
    """The same packed length: 4 user texts, or 2 user texts and 2 references."""
    sft, _ = two_ranks("gathers-sft")
    surgery, _ = two_ranks("gathers-surgery")
    assert sft["gathers"][-1][0] > 0
    assert surgery["gathers"] == sft["gathers"]
